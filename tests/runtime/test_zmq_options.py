"""`worldvln-edge serve --zmq ...`: what its options mean, and what is refused before any engine loads."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from worldvln_edge import cli
from worldvln_edge.curve_keys import CurveKeyError, write_key_pair
from worldvln_edge.runtime.doors.zmq_option import ZmqOptionError, zmq_config, zmq_options


def serve(folder: Path, *options: str):
    return CliRunner().invoke(cli.main, ["serve", str(folder), *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--zmq", "tcp://*:8003"], "can be reached from other machines and no key is set"),
        (["--zmq", "nonsense"], "is no ZeroMQ address to listen on"),
        (["--zmq", "ipc:///x", "--zmq", "tcp://0.0.0.0:8003"], "tcp://0.0.0.0:8003 can be reached from other machines"),
    ],
)
def test_unsafe_or_unknown_endpoint_ends_with_one_line(tmp_path: Path, options: list[str], message: str):
    result = serve(tmp_path, *options)
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert message in result.output


def test_endpoint_with_keys_gets_as_far_as_the_bundle(tmp_path: Path):
    pair = write_key_pair(tmp_path, "server")
    assert pair.public
    (tmp_path / "clients").mkdir()
    write_key_pair(tmp_path / "clients", "drone")
    keys = ["--zmq-key-file", str(tmp_path / "server.key_secret"), "--zmq-clients", str(tmp_path / "clients")]
    result = serve(tmp_path, "--zmq", "tcp://*:8003", *keys)
    assert result.exit_code == 1
    assert "manifest.json" in result.output  # the folder is no bundle


def test_key_options_without_what_they_need_are_named(tmp_path: Path):
    write_key_pair(tmp_path, "server")
    (tmp_path / "clients").mkdir()
    key, clients = tmp_path / "server.key_secret", tmp_path / "clients"
    with pytest.raises(ZmqOptionError, match=r"--zmq-key-file NAME\.key_secret too"):
        zmq_config(("ipc:///x",), None, clients, 0o600)
    with pytest.raises(ZmqOptionError, match="--zmq-key-file needs an address"):
        zmq_config((), key, None, 0o600)
    with pytest.raises(CurveKeyError, match="holds no client's public key"):
        zmq_config(("ipc:///x",), key, clients, 0o600)
    assert zmq_config((), None, None, 0o600) is None


@click.command()
@zmq_options
def _show(zmq_endpoints, zmq_key_file, zmq_clients, zmq_ipc_mode):
    click.echo(f"{zmq_endpoints} {zmq_key_file} {zmq_clients} {zmq_ipc_mode:o}")


def test_options_are_read_and_a_mode_that_is_none_is_wrong_usage():
    shown = CliRunner().invoke(_show, ["--zmq", "ipc:///a", "--zmq", "tcp://127.0.0.1:1", "--zmq-ipc-mode", "0660"])
    assert shown.output == "('ipc:///a', 'tcp://127.0.0.1:1') None None 660\n"
    for mode in ("rw", "0900", "-1", "10000"):
        refused = CliRunner().invoke(_show, [f"--zmq-ipc-mode={mode}"])
        assert refused.exit_code == 2
        assert "is no file mode, for example 0600" in refused.output
