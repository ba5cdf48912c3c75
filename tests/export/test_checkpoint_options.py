"""Released files that are named one by one are the checkpoint that `released.json` describes."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from worldvln_edge.cli import main
from worldvln_edge.export.checkpoint_options import CheckpointChoice
from worldvln_edge.export.make_checkpoint import make_checkpoint
from worldvln_edge.models.checkpoint_source import open_any
from worldvln_edge.presets import preset


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "nano"
    make_checkpoint(preset("nano"), folder, seed=0)
    return folder


def named(folder: Path) -> dict[str, Path]:
    return {
        "backbone": folder / "backbone",
        "vae": folder / "vae.pth",
        "text": folder / "text_encoder",
        "action": folder / "action_decoder.pt",
    }


def options(folder: Path) -> list[str]:
    return ["--preset", "nano", *(word for name, path in named(folder).items() for word in (f"--{name}", str(path)))]


def test_named_files_are_the_checkpoint_that_the_description_names(released: Path, monkeypatch: pytest.MonkeyPatch):
    expected = open_any(released).fingerprint()
    assert CheckpointChoice(checkpoint=released).open().fingerprint() == expected
    assert CheckpointChoice(preset="nano", **named(released)).open().fingerprint() == expected
    monkeypatch.chdir(released)
    assert CheckpointChoice(preset="nano", **named(Path())).open().fingerprint() == expected


@pytest.mark.parametrize("command", ["export", "calibrate"])
def test_commands_say_how_a_checkpoint_is_named(command: str, released: Path, tmp_path: Path):
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(main, [command, *arguments, "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        return " ".join(result.output.split())

    example = "--preset worldvln-8b --backbone gpt --vae vae.pth --text flan-t5-xl --action stage2.pt"
    assert f"no checkpoint given; give --checkpoint FOLDER, or all released files: {example}" in refused()
    assert "--preset, --text, --action of the released files missing" in refused("--backbone", "gpt")
    both = refused("--checkpoint", str(released), *options(released))
    assert "--checkpoint names a whole checkpoint, --preset a part of one; give either" in both


def test_export_takes_named_files(released: Path, tmp_path: Path):
    """As far as the exporter's own first check: an export of this preset takes minutes."""
    arguments = ["export", *options(released), "--out", str(tmp_path / "out"), "--precision", "int8"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "precision int8 needs the ranges of activations" in result.output
    arguments[arguments.index("--vae") + 1] = "nothing.pth"
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "no video VAE at" in result.output


def test_a_choice_of_nothing_is_wrong_usage():
    with pytest.raises(click.UsageError, match="no checkpoint given"):
        CheckpointChoice()
