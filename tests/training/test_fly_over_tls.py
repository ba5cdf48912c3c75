"""`fly` and `eval` through a server whose certificate a private authority signed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Authority
from click.testing import CliRunner, Result

from worldvln_edge.cli import main
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.tls import server_context
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.tasks import write_task_list
from worldvln_edge.training.sim.tasks import generate_task


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Iterator[BackgroundServer]:
    files = authority.certify("server", "127.0.0.1")
    context = server_context(files.certificate, files.key)
    with BackgroundServer(NullPolicy(image_hw=(16, 16)), tls=context, keys=["secret"]) as server:
        yield server


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, list[str]]:
    """Arguments of each command but for the server's; one task."""
    tasks, keys = tmp_path / "tasks.json", tmp_path / "keys.txt"
    write_task_list([generate_task("test", 0)], tasks)
    keys.touch(mode=0o600)
    keys.write_text("secret\n")
    common = ["--key-file", str(keys), "--out", str(tmp_path / "out"), "--json"]
    return {
        "fly": ["fly", "--tasks", str(tasks), "--no-video", *common],
        "eval": ["eval", "--count", "1", "--workers", "1", "--no-baselines", *common],
    }


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", ["fly", "eval"])
def test_server_of_a_private_authority_is_flown_through_with_its_ca_file(server, authority, commands, command):
    https = server.url.replace("wss://", "https://").removesuffix("/v1/session")
    for url in (server.url, https):
        flown = invoke(*commands[command], "--server", url, "--ca-file", authority.file)
        assert flown.exit_code == 0, flown.output
        assert json.loads(flown.stdout)["profiles"] == ["exact"]


@pytest.mark.parametrize("command", ["fly", "eval"])
def test_without_its_ca_file_the_server_is_refused_and_the_option_is_named(server, commands, command):
    refused = invoke(*commands[command], "--server", server.url)
    assert refused.exit_code == 1
    assert "its certificate is not trusted" in refused.output
    assert "on a command line, --ca-file" in refused.output


def test_workers_of_eval_trust_it_too(server, authority, commands):
    flown = invoke(*commands["eval"], "--workers", 2, "--count", 2, "--server", server.url, "--ca-file", authority.file)
    assert flown.exit_code == 0, flown.output
    assert json.loads(flown.stdout)["tasks"] == 2


@pytest.mark.parametrize("command", ["fly", "eval"])
def test_ca_file_is_refused_where_no_tls_is_spoken(authority, commands, command, tmp_path):
    plain = invoke(*commands[command], "--server", "ws://127.0.0.1:9", "--ca-file", authority.file)
    assert plain.exit_code == 1
    assert "behind wss://, but ws://127.0.0.1:9/v1/session is not such an address" in plain.output
    bundle = invoke(*commands[command], "--bundle", tmp_path, "--ca-file", authority.file)
    assert bundle.exit_code == 2
    assert "--ca-file says whom to trust behind --server wss://HOST:PORT" in " ".join(bundle.output.split())


@pytest.mark.parametrize("command", ["fly", "eval"])
def test_ca_file_that_holds_no_certificate_is_named(server, commands, command, tmp_path):
    junk = tmp_path / "junk.pem"
    junk.write_text("nothing of the kind")
    refused = invoke(*commands[command], "--server", server.url, "--ca-file", junk)
    assert refused.exit_code == 1
    assert f"cannot read certificates from {junk} (it holds no certificate)" in refused.output
