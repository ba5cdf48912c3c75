"""Options of all commands that read a checkpoint: a folder, or the released files one by one.

The files one by one are what `released.json` says, without the file (`checkpoint_source.ReleasedParts`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldvln_edge.presets import PRESET_NAMES

if TYPE_CHECKING:
    from worldvln_edge.models.checkpoint_source import CheckpointSource

_EXAMPLE = "--preset worldvln-8b --backbone gpt --vae vae.pth --text flan-t5-xl --action stage2.pt"
_NEEDED = ("preset", "backbone", "text", "action")  # the VAE may lie in the backbone's folder
_PATH = click.Path(path_type=Path)


@dataclass(frozen=True, kw_only=True)
class CheckpointChoice:
    """Which checkpoint a command line names. Options that were not given are None.

    Raises:
        click.UsageError: no checkpoint, two of them, or released files that are not all named.
    """

    checkpoint: Path | None = None
    preset: str | None = None
    backbone: Path | None = None
    vae: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = None
    action: Path | None = None
    rgb_head: Path | None = None
    rgb_run_config: Path | None = None
    trust_pickle: bool = False

    def __post_init__(self) -> None:
        named = [name for name in _PARTS if getattr(self, name) is not None]
        if self.checkpoint is not None and named:
            raise click.UsageError(
                f"--checkpoint names a whole checkpoint, {_flag(named[0])} a part of one; give either"
            )
        missing = [_flag(name) for name in _NEEDED if getattr(self, name) is None]
        if self.checkpoint is None and missing:
            found = f"{', '.join(missing)} of the released files missing" if named else "no checkpoint given"
            raise click.UsageError(f"{found}; give --checkpoint FOLDER, or all released files: {_EXAMPLE}")

    def open(self) -> CheckpointSource:
        """Open what was named.

        Raises:
            CheckpointError, ConfigError: see `checkpoint_source.open_any` and `open_parts`.
        """
        from worldvln_edge.models.checkpoint_source import ReleasedParts, open_any, open_parts

        if self.checkpoint is not None:
            return open_any(self.checkpoint, trust_pickle=self.trust_pickle)

        def text(path: Path | None) -> str | None:
            return None if path is None else str(path)

        parts = ReleasedParts(
            preset=self.preset,
            backbone=str(self.backbone),
            vae=text(self.vae),
            text_encoder=str(self.text),
            tokenizer=text(self.tokenizer),
            action_decoder=str(self.action),
            rgb_head=text(self.rgb_head),
            rgb_run_config=text(self.rgb_run_config),
        )
        return open_parts(parts, Path.cwd(), trust_pickle=self.trust_pickle)


_PARTS = tuple(one.name for one in fields(CheckpointChoice) if one.name not in ("checkpoint", "trust_pickle"))


def checkpoint_options(command: Callable) -> Callable:
    """Decorator: adds the options, and passes them as one `checkpoint: CheckpointChoice`."""
    options = [
        click.option(
            "--checkpoint",
            type=click.Path(file_okay=False, path_type=Path),
            help="Checkpoint folder: ours, or one with released.json.",
        ),
        click.option("--preset", type=click.Choice(PRESET_NAMES), help="Sizes of the released files that are named."),
        click.option("--backbone", type=_PATH, help="Released transformer: folder of shards, or a file."),
        click.option("--vae", type=_PATH, help="Released video VAE.  [default: folder vae/ of --backbone]"),
        click.option("--text", type=_PATH, help="Hugging Face folder of flan-t5."),
        click.option("--tokenizer", type=_PATH, help="tokenizer.json.  [default: the one in --text]"),
        click.option("--action", type=_PATH, help="Combined (Stage-2) checkpoint of the action decoder."),
        click.option("--rgb-head", type=_PATH, help="TimesFormer of the RGB head.  [default: none]"),
        click.option("--rgb-run-config", type=_PATH, help="run_config.json of --rgb-head."),
        click.option("--trust-pickle", is_flag=True, help="Allow torch files to run code while they are read."),
    ]

    def gathered(**values: Any) -> Any:
        chosen = {one.name: values.pop(one.name) for one in fields(CheckpointChoice)}
        return command(checkpoint=CheckpointChoice(**chosen), **values)

    gathered.__name__, gathered.__doc__ = command.__name__, command.__doc__
    gathered.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in reversed(options):
        gathered = option(gathered)
    return gathered


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
