"""`worldvln-edge eval card`."""

from __future__ import annotations

from pathlib import Path

import click

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command("card")
@click.argument("files", type=click.Path(dir_okay=False, path_type=Path), nargs=-1, required=True)
@click.option("--eval", "evaluation", type=_FOLDER, help="The --out folder of `worldvln-edge eval`.")
@click.option("--acceptance", type=_FOLDER, help="The --out folder of `worldvln-edge eval acceptance`.")
@click.option("--comparison", type=_FOLDER, help="The --work folder of `worldvln-edge train grpo-compare`.")
@click.option("--checkpoint", type=_FOLDER, help="The checkpoint folder: how it was trained.")
def card_command(
    files: tuple[Path, ...],
    evaluation: Path | None,
    acceptance: Path | None,
    comparison: Path | None,
    checkpoint: Path | None,
) -> None:
    """Write the numbers of finished runs into Markdown FILES, between their markers (docs/evaluation.md).

    Example: worldvln-edge eval card README.md --eval runs/eval --acceptance runs/acceptance --checkpoint runs/nano
    """
    if evaluation is acceptance is comparison is checkpoint is None:
        raise click.UsageError("give --eval DIR, --acceptance DIR, --comparison DIR or --checkpoint DIR")

    from worldvln_edge.training.evaluation.model_card import (
        acceptance_sections,
        comparison_sections,
        evaluation_sections,
        fill_cards,
        training_sections,
    )

    sections = {} if evaluation is None else evaluation_sections(evaluation)
    sections |= {} if acceptance is None else acceptance_sections(acceptance)
    sections |= {} if comparison is None else comparison_sections(comparison)
    sections |= {} if checkpoint is None else training_sections(checkpoint)
    for path, has_changed in zip(files, fill_cards(files, sections), strict=True):
        click.echo(f"{path}: {'written' if has_changed else 'unchanged'}")
