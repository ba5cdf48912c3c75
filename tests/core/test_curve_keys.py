"""CURVE key files: who may read them, what is never replaced, and what is said of a file that is no key."""

import stat
from pathlib import Path

import pytest
import zmq
from click.testing import CliRunner
from zmq.auth import load_certificate

from worldvln_edge import cli
from worldvln_edge.curve_keys import (
    CurveClientKeys,
    CurveKeyError,
    read_key_pair,
    read_public_key,
    read_public_keys,
    write_key_pair,
)


def test_written_keys_are_read_again_here_and_by_pyzmq(tmp_path: Path):
    pair = write_key_pair(tmp_path / "keys", "drone-1")
    secret, public = tmp_path / "keys" / "drone-1.key_secret", tmp_path / "keys" / "drone-1.key"
    assert read_key_pair(secret) == pair
    assert read_public_key(public) == read_public_key(secret) == pair.public
    assert load_certificate(secret) == (pair.public, pair.secret)
    assert load_certificate(public) == (pair.public, None)
    assert zmq.curve_public(pair.secret) == pair.public
    assert CurveClientKeys.read(secret, public).server_public == pair.public
    assert pair.secret.decode() not in repr(pair)


def test_secret_file_is_closed_to_others_whatever_the_mask(tmp_path: Path):
    write_key_pair(tmp_path, "a")
    assert stat.S_IMODE((tmp_path / "a.key_secret").stat().st_mode) == 0o600
    (tmp_path / "a.key_secret").chmod(0o640)
    with pytest.raises(CurveKeyError, match="chmod 600"):
        read_key_pair(tmp_path / "a.key_secret")


def test_existing_keys_are_never_replaced(tmp_path: Path):
    pair = write_key_pair(tmp_path, "a")
    with pytest.raises(CurveKeyError, match="a key is not replaced"):
        write_key_pair(tmp_path, "a")
    (tmp_path / "a.key_secret").unlink()
    with pytest.raises(CurveKeyError, match="a key is not replaced"):
        write_key_pair(tmp_path, "a")
    assert read_public_key(tmp_path / "a.key") == pair.public


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "/etc/a"])
def test_name_is_a_plain_file_name(tmp_path: Path, name: str):
    with pytest.raises(CurveKeyError, match="is no name for a key"):
        write_key_pair(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CurveKeyError, match="cannot write keys into"):
        write_key_pair(tmp_path / "file" / "keys", "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read a CURVE key"),
        ("", "cannot read a CURVE key"),
        ('public-key = "short"', "damaged key"),
        ('public-key = "' + 40 * '"' + '"', "damaged key"),
        ('public-key = "' + 40 * "#" + '"', "damaged key"),
        ('public-key = "' + 45 * "0" + '"', "damaged key"),
    ],
)
def test_file_that_is_no_key_is_named(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "a.key"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CurveKeyError, match=message):
        read_public_key(path)


def test_public_file_in_place_of_a_secret_one_is_named(tmp_path: Path):
    write_key_pair(tmp_path, "a")
    with pytest.raises(CurveKeyError, match=r"holds no secret key; give the file a\.key_secret"):
        read_key_pair(tmp_path / "a.key")


def test_folder_of_clients_needs_a_key_and_no_damaged_one(tmp_path: Path):
    with pytest.raises(CurveKeyError, match="holds no client's public key"):
        read_public_keys(tmp_path)
    with pytest.raises(CurveKeyError, match="holds no client's public key"):
        read_public_keys(tmp_path / "none")
    pairs = [write_key_pair(tmp_path, name) for name in ("a", "b")]
    assert read_public_keys(tmp_path) == {pair.public for pair in pairs}
    (tmp_path / "c.key").write_text('public-key = "x"')
    with pytest.raises(CurveKeyError, match=r"c\.key holds a damaged key"):
        read_public_keys(tmp_path)


def test_keygen_prints_public_keys_and_keeps_secret_ones_to_itself(tmp_path: Path):
    result = CliRunner().invoke(cli.main, ["keygen", "server", "drone-1", "--out", str(tmp_path)])
    assert result.exit_code == 0
    for name in ("server", "drone-1"):
        pair = read_key_pair(tmp_path / f"{name}.key_secret")
        assert pair.public.decode() in result.stdout
        assert pair.secret.decode() not in result.output
    again = CliRunner().invoke(cli.main, ["keygen", "server", "--out", str(tmp_path)])
    assert (again.exit_code, again.output.count("\n")) == (1, 1)
    assert "a key is not replaced" in again.output
