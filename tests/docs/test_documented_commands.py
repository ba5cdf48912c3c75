"""Commands and examples that the pages print are those of this version: programs, options, values, targets, extras."""

import re
import shlex
import sys
from pathlib import Path

import click
import msgspec
import numpy as np
import pytest

from worldvln_edge.cli import main
from worldvln_edge.tasks import SceneRef, Task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "deploy/README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_-]*$|\.\.\.")
"""NEW, BUNDLE, N: for the reader to fill in."""


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """Words of every simple command in the page's shell blocks."""
    found: list[list[str]] = []
    for line in "\n".join(blocks(page, "", "bash", "sh")).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # drawn output with a quote in it
            continue
        found.append([])
        for word in words:
            if set(word) <= set("();<>|&"):
                found.append([])
            else:
                found[-1].append(word)
    return [words for words in found if words]


def after(words: list[str], program: str) -> list[str] | None:
    """Arguments of a program, which torchrun may start; None: another command."""
    for i, word in enumerate(words):
        if word.rsplit("/", 1)[-1] == program:
            return words[i + 1 :]
        if "=" not in word and words[0] != "torchrun":
            return None
    return None


def check_command(arguments: list[str]) -> None:
    """Parse as the program does; files that are named need not be there."""
    command: click.Command = main
    context = click.Context(command)
    while isinstance(command, click.Group):
        if arguments[:1] in ([], ["--help"], ["--version"]):
            return
        if command.invoke_without_command and arguments[0].startswith("-"):
            break
        name, *arguments = arguments
        found = command.get_command(context, name)
        assert found is not None, f"no command {name!r} of {context.command_path!r}"
        command, context = found, click.Context(found, parent=context, info_name=name)
    values, rest, _ = command.make_parser(context).parse_args(list(arguments))
    assert not rest, f"{rest} are too many"
    for parameter in command.params:
        value = values.get(parameter.name)
        given = value if isinstance(value, list | tuple) else [value]
        if parameter.required:
            assert parameter.name in values
            assert any(each is not None and not repr(each).startswith("Sentinel") for each in given), parameter.name
        if isinstance(parameter.type, click.Choice | click.types.IntParamType | click.types.FloatParamType):
            for each in given:
                if isinstance(each, str) and not PLACEHOLDER.match(each):
                    parameter.type.convert(each, parameter, context)


OURS = [
    pytest.param(arguments, id=f"{page.name}: {' '.join(arguments)}"[:90])
    for page in PAGES
    for words in commands(page)
    if (arguments := after(words, "worldvln-edge")) is not None
]


def test_the_pages_print_commands():
    assert len(OURS) > 80


@pytest.mark.parametrize("arguments", OURS)
def test_command_has_these_options_and_values(arguments: list[str]):
    check_command(arguments)


@pytest.mark.parametrize(
    "arguments", [["train", "all", "--presets", "nano"], ["flyy"], ["serve", "b", "c"], ["ros", "run", "--via", "dss"]]
)
def test_what_no_command_takes_is_found(arguments: list[str]):
    with pytest.raises((AssertionError, click.UsageError)):
        check_command(arguments)


def test_targets_and_extras_are_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted_targets, wanted_extras = set(), set()
    for page in PAGES:
        for words in commands(page):
            if words[0] == "make":
                wanted_targets.update(word for word in words[1:] if re.fullmatch(r"[a-z-]+", word))
            if "pip" in words[0]:
                for extras in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
                    wanted_extras.update(extras.split(","))
    assert wanted_targets
    assert wanted_targets <= targets
    assert wanted_extras
    assert wanted_extras <= set(project["optional-dependencies"])


CONFIGS = [
    pytest.param(text, id=f"{name}-{number}")
    for name in ("ros.md", "hover.md")
    for number, text in enumerate(blocks(ROOT / "docs" / name, "toml"))
]


@pytest.mark.parametrize("text", CONFIGS)
def test_configuration_of_the_bridge_is_read(text: str, tmp_path: Path):
    from worldvln_edge.ros_bridge.bridge_config import read_bridge_config

    if "[limits]" not in text:
        text += "[limits]\ngeofence_min_m = [-5, -5, -1]\ngeofence_max_m = [5, 5, 4]\n"
    (tmp_path / "drone.toml").write_text(text)
    config = read_bridge_config(tmp_path / "drone.toml")
    for table, fields in tomllib.loads(text).items():
        shown = msgspec.to_builtins(getattr(config, table))
        assert {name: shown[name] for name in fields} == {
            name: tuple(value) if isinstance(shown[name], tuple) else value for name, value in fields.items()
        }


def test_clients_of_the_operations_page_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from click.testing import CliRunner

    made = CliRunner().invoke(main, ["keygen", "server", "drone-1", "--out", str(tmp_path)])
    assert made.exit_code == 0, made.output
    monkeypatch.chdir(tmp_path)
    examples = blocks(ROOT / "docs/operations.md", "python")
    assert len(examples) == 2
    for example in examples:
        names: dict = {"key": "k" * 32}
        if "authority.pem" in example:
            from certificates import Authority

            assert Authority(tmp_path).file.name == "authority.pem"
        exec(compile(example, "operations.md", "exec"), names)
        assert "//ground.example:80" in names["client"].url


def test_example_of_the_environments_flies():
    pytest.importorskip("mujoco", reason="flies in the simulator, which needs the extra sim")
    (example,) = blocks(ROOT / "docs/environments.md", "python")
    task = Task(instruction="Fly.", initial_pos=(0, 0, 300, 0, 0, 0), scene=SceneRef(family="city", seed=0))
    names: dict = {"task_a": task, "task_b": task, "actions_N6": np.zeros((2, 6))}
    exec(compile(example, "environments.md", "exec"), names)
    assert names["failed"] == {}
    assert names["seen"]["b"].frames.shape == (2, 64, 64, 3)
