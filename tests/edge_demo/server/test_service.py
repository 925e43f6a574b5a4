"""The unit that systemd reads, and what the server tells it."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import socket
import subprocess
import sys

import pytest

from edge_demo.cli import install_service
from tests.edge_demo.server.conftest import serving


def parsed(text):
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read_string(text)
    return unit


def test_a_users_unit_starts_the_server_that_was_asked_for(
    run, tiny_bundles, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    bundle = tiny_bundles / "chat"
    asked = ("install-service", "--name", "my-gemma", "--memory-mb", 900, bundle, "--port", 8123)
    status, out, err = run(*asked)
    path = tmp_path / "systemd" / "user" / "my-gemma.service"
    assert (status, err) == (0, "") and str(path) in out and "enable-linger" in out
    service = parsed(path.read_text())["Service"]
    command = shlex.split(service["ExecStart"])
    assert command[0] == sys.executable
    assert command[1:] == ["-m", "edge_demo", "serve", str(bundle.resolve()), "--port", "8123"]
    assert service["MemoryMax"] == "900M" and service["Restart"] == "on-failure"
    assert "DynamicUser" not in service and "User" not in service
    assert service["WorkingDirectory"] == os.getcwd()  # which names of files are relative to
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_systems_unit_runs_as_who_owns_the_bundle(tiny_bundles):
    text = install_service.unit_text(tiny_bundles / "chat", [], None, "pi")
    service = parsed(text)["Service"]
    assert service["User"] == "pi" and "DynamicUser" not in service
    unit = parsed(install_service.unit_text(tiny_bundles / "chat", [], None, "root"))
    assert unit["Service"]["DynamicUser"] == "yes" and "User" not in unit["Service"]
    assert unit["Service"]["ProtectSystem"] == "strict"
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    assert int(unit["Unit"]["StartLimitBurst"]) == 5


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_reads_it(tiny_bundles, tmp_path):
    bundle = tiny_bundles / "chat"
    path = tmp_path / "gemma.service"
    path.write_text(install_service.unit_text(bundle, ["--allow-host", "a b%c"], 500, "root"))
    done = subprocess.run(
        ["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60
    )
    assert "gemma.service" not in done.stderr, done.stderr


def test_strange_arguments_stay_what_they_are(tiny_bundles):
    strange = ["--allow-host", 'a "b" $c %d\\']
    text = install_service.unit_text(tiny_bundles / "chat", strange, None, None)
    line = parsed(text)["Service"]["ExecStart"].replace("%%", "%").replace("$$", "$")
    assert shlex.split(line)[-2:] == strange


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--name", "../evil", "BUNDLE"), ["../evil"]),
        (("BUNDLE", "--port", "x"), ["--port"]),
        (("BUNDLE", "--nonsense"), ["--nonsense"]),
        (("/nonexistent",), ["bundle.json"]),
        (("--memory-mb", "0", "BUNDLE"), ["--memory-mb"]),
    ],
)
def test_what_would_fail_at_every_start_is_refused_now(
    refused, tiny_bundles, tmp_path, monkeypatch, arguments, names
):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    given = [tiny_bundles / "chat" if a == "BUNDLE" else a for a in arguments]
    refused("install-service", *given, names=names)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(refused, tiny_bundles, tmp_path, monkeypatch):
    taken = tmp_path / "config"
    taken.write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(taken))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    refused("install-service", tiny_bundles / "chat", names=["cannot be written"], status=1)


def test_systemd_is_told_that_it_is_ready_alive_and_ending(tiny_bundles, tmp_path):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(30)
        environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "300000"}
        with serving(tmp_path, tiny_bundles / "chat", **environment) as server:
            told = {sock.recv(100) for _ in range(4)}
            assert told == {b"READY=1", b"WATCHDOG=1"}
            assert server.end() == 0
        rest = set()
        while b"STOPPING=1" not in rest:
            rest.add(sock.recv(100))
