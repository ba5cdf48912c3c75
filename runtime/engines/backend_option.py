"""The option `--backend`, of every command that flies a bundle."""

from __future__ import annotations

import click

# Spelled out, because `backends.BACKENDS` comes with the engines, which `--help` does not need.
backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]),
    default="auto",
    show_default=True,
    help="What runs the graphs; auto: TensorRT engines of the bundle that fit this GPU, else CUDA, else the CPU.",
)
