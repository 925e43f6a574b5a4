"""Who may ask: each clause is a test."""

from __future__ import annotations

import pytest

from edge_demo.server.http.access import Access, host_name
from edge_demo.server.protocol.errors import Refusal

OWN = Access(hosts=("pi.local",), origins=("https://chat.example",))


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "192.168.1.7", "PI.local"]
)
def test_this_machines_names_and_addresses_are_known(host):
    OWN.check_host(host)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example", "a@localhost",
     "localhost:x", "localhost:99999", "x" * 300, "localhost/..", "[::1", "1.2.3.4.5"],
)  # fmt: skip
def test_other_names_may_have_been_given_this_machines_address(host):
    with pytest.raises(Refusal) as found:
        OWN.check_host(host)
    assert found.value.status == 403


def test_the_name_in_a_host_header():
    assert host_name("[2001:db8::1]:80") == "2001:db8::1" and host_name("Pi:80") == "pi"


def test_own_pages_and_named_ones_may_ask():
    assert not OWN.check_origin("http://pi.local:8080", "pi.local:8080")
    assert OWN.check_origin("https://chat.example", "pi.local:8080")


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "", "http://pi.local", "http://pi.local:8081",
     "https://chat.example.evil", "file://pi.local:8080", "://pi.local:8080"],
)  # fmt: skip
def test_pages_of_other_servers_may_not(origin):
    with pytest.raises(Refusal) as found:
        OWN.check_origin(origin, "pi.local:8080")
    assert found.value.status == 403


def test_keys():
    access = Access(keys=("first", "sécond"))
    spaces = {access.namespace("Bearer first"), access.namespace("bearer  sécond ")}
    assert len(spaces) == 2 and "" not in spaces
    for wrong in ("", "first", "Bearer", "Bearer ", "Basic first", "Bearer firs", "Bearer firstx"):
        with pytest.raises(Refusal) as found:
            access.namespace(wrong)
        assert found.value.status == 401
    assert Access().namespace("") == ""
