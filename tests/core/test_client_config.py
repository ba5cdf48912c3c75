"""What a client may be told: one list, complete, with its errors."""

import dataclasses

import pytest

from worldvln_edge.async_client import AsyncSessionClient
from worldvln_edge.client import SessionClient
from worldvln_edge.client_config import ClientConfig, ClientOptions
from worldvln_edge.client_errors import ServerAddressError

CLIENTS = pytest.mark.parametrize("client", [SessionClient, AsyncSessionClient])


def test_every_attribute_behind_url_and_key_is_an_option_of_the_clients():
    names = [field.name for field in dataclasses.fields(ClientConfig)]
    assert names == ["url", "key", *ClientOptions.__annotations__]


def test_url_is_kept_in_full_and_says_whether_tls_is_spoken():
    assert ClientConfig(url="drone:8001").url == "ws://drone:8001/v1/session"
    assert ClientConfig(url="drone:8001").tls is None
    assert ClientConfig(url="https://drone").tls is not None


def test_heartbeats_go_out_thrice_before_a_silent_link_is_given_up():
    assert ClientConfig(url="drone", silent_for_s=6.0).heartbeat_s == 2.0


@CLIENTS
@pytest.mark.parametrize("silent_for_s", [0, -1.0, float("nan")])
def test_time_that_is_none_is_refused(client, silent_for_s):
    with pytest.raises(ValueError, match="silent_for_s must be more than 0 s"):
        client("ws://drone", silent_for_s=silent_for_s)


@CLIENTS
def test_option_that_does_not_exist_is_refused(client):
    with pytest.raises(TypeError, match="patience_s"):
        client("ws://drone", patience_s=3)


@CLIENTS
def test_url_that_is_no_address_is_refused_before_anybody_connects(client):
    with pytest.raises(ServerAddressError, match=r"ftp://drone is no server's address"):
        client("ftp://drone")
