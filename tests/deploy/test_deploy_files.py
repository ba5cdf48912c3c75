"""Unit files and Dockerfiles, as far as they can be checked without an aircraft: by systemd's and Docker's linters."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from worldvln_edge.cli import main

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("Dockerfile.*"))
PROGRAM = re.compile(r"^Exec(?:Start|StartPre|Stop)=(\S+)", re.MULTILINE)


def test_there_is_something_to_check():
    assert [path.stem for path in UNITS] == [
        "worldvln-clocks",
        "worldvln-edge",
        "worldvln-policy",
        "worldvln-setpoints",
    ]
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".cuda", ".jetson"]


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze (package systemd) is not installed"
)
def test_units_pass_systemd_analyze(tmp_path: Path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for unit in UNITS:  # their programs lie on the aircraft
        text = PROGRAM.sub(lambda found: found[0].replace(found[1], str(program)), unit.read_text())
        (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(tmp_path / unit.name for unit in UNITS)],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def commands(text: str) -> list[list[str]]:
    """Arguments of every call of ours: of units and, with the entry point in front, of Dockerfiles."""
    joined = text.replace("\\\n", " ")
    found = [shlex.split(line)[1:] for line in re.findall(r"^ExecStart=(.*worldvln-edge .*)$", joined, re.MULTILINE)]
    return found + [shlex.split(line.replace(",", " ")) for line in re.findall(r"^CMD \[(.*)\]$", joined, re.MULTILINE)]


@pytest.mark.parametrize("path", [*UNITS, *DOCKERFILES], ids=lambda path: path.name)
def test_commands_have_options_that_exist(path: Path, tmp_path: Path):
    for arguments in commands(path.read_text()):
        command, rest = main, list(arguments)
        context = click.Context(main)
        while isinstance(command, click.Group):
            name, command, rest = command.resolve_command(context, rest)
            assert command is not None, arguments
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in rest if word.startswith("--")} <= options, (name, rest)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pass_the_linter(path: Path):
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_name_extras_that_exist(path: Path):
    known = set(re.findall(r"^([a-z-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    named = {
        name for extras in re.findall(r"\$\{wheel\}\[([a-z,-]+)\]", path.read_text()) for name in extras.split(",")
    }
    assert named
    assert named <= known
