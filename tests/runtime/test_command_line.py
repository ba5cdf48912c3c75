"""The command line: what it loads, what it answers, how it fails."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from worldvln_edge import __version__, cli
from worldvln_edge.config import ConfigError
from worldvln_edge.runtime.cli import parse_address

HEAVY = ("torch", "onnxruntime", "onnx", "mujoco", "transformers", "tokenizers")


def modules_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(' '.join(sys.modules), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import worldvln_edge.cli",
        "import worldvln_edge.cli\ntry: worldvln_edge.cli.main(['--help'])\nexcept SystemExit: pass",
        "import worldvln_edge.client",
        "import worldvln_edge.runtime",
        "import worldvln_edge.runtime.doors.server",
        "import worldvln_edge.runtime.cli",
    ],
)
def test_loads_neither_torch_nor_an_engine(code):
    assert not modules_after(code) & set(HEAVY)


def test_help_loads_no_room():
    loaded = modules_after("import worldvln_edge.cli\ntry: worldvln_edge.cli.main(['--help'])\nexcept SystemExit: pass")
    rooms = ("models", "export", "runtime", "training")
    assert not {name for name in loaded if name.startswith(tuple(f"worldvln_edge.{room}" for room in rooms))}


def test_help_lists_every_subcommand():
    result = CliRunner().invoke(cli.main, ["--help"])
    assert result.exit_code == 0
    for name, subcommand in cli.SUBCOMMANDS.items():
        assert name in result.output
        assert subcommand.help in result.output


def test_version():
    assert __version__ in CliRunner().invoke(cli.main, ["--version"]).output


def test_unknown_subcommand_is_wrong_usage():
    result = CliRunner().invoke(cli.main, ["dance"])
    assert result.exit_code == 2
    assert "No such command 'dance'" in result.output


@pytest.fixture
def register(monkeypatch):
    """Put a command into the table under a module made for the test."""

    def put(name: str, source: str, extra: str = "sim", *, tmp_path) -> None:
        (tmp_path / f"{name}_commands.py").write_text("import click\n\n\n" + source)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setitem(cli.SUBCOMMANDS, name, cli.Subcommand(f"{name}_commands:command", extra, "For a test."))

    return put


def test_missing_dependency_names_the_extra(register, tmp_path):
    register("hover", "import no_such_simulator\n", tmp_path=tmp_path)
    result = CliRunner().invoke(cli.main, ["hover"])
    assert result.exit_code == 1
    assert "pip install 'worldvln-edge[sim]'" in result.output
    assert "no_such_simulator" in result.output
    assert result.output.count("\n") == 1


def test_dependency_missing_inside_a_command_names_its_own_extra(register, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    register("land", "@click.command()\ndef command():\n    import uvicorn\n", tmp_path=tmp_path)
    result = CliRunner().invoke(cli.main, ["land"])
    assert result.exit_code == 1
    assert "pip install 'worldvln-edge[serve]'" in result.output


def test_our_typed_errors_are_one_line_and_exit_1(register, tmp_path):
    source = "from worldvln_edge.config import ConfigError\n\n\n@click.command()\ndef command():\n"
    register("climb", source + "    raise ConfigError('num_frames must be 49')\n", tmp_path=tmp_path)
    result = CliRunner().invoke(cli.main, ["climb"])
    assert (result.exit_code, result.output) == (1, "error: num_frames must be 49\n")
    assert issubclass(ConfigError, ValueError)


def test_faults_keep_their_traceback(register, tmp_path):
    register("stall", "@click.command()\ndef command():\n    raise ValueError('a bug')\n", tmp_path=tmp_path)
    result = CliRunner().invoke(cli.main, ["stall"])
    assert isinstance(result.exception, ValueError)


def test_serve_refuses_an_open_address_before_it_loads_anything(tmp_path):
    result = CliRunner().invoke(cli.main, ["serve", str(tmp_path), "--ws", "0.0.0.0:0"])
    assert result.exit_code == 1
    assert result.output.startswith("error: 0.0.0.0 can be reached from other machines")


@pytest.mark.parametrize(
    ("text", "address"), [("127.0.0.1:8001", ("127.0.0.1", 8001)), ("[::1]:0", ("::1", 0)), ("drone:80", ("drone", 80))]
)
def test_address_is_read(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["8001", "drone:", ":8001", "::1:8001", "drone:99999", "drone:x"])
def test_bad_address_is_refused_with_an_example(text):
    with pytest.raises(click.BadParameter, match=r"127\.0\.0\.1:8001"):
        parse_address(text)
