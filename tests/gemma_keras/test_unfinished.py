"""Half-made folders: whole or not there, whoever is killed when, and wherever else others write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_demo.durable import whole_or_nothing

ROOT = Path(__file__).parents[2]
# Writes a folder whose one file says who made it; what else lies in the old one is kept. Killed
# before or after its n-th renaming, if it is told to be.
WRITE = """
import os, sys
from pathlib import Path
from edge_demo.durable import whole_or_nothing
target, who, kill = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
count, rename = 0, Path.rename
def killed(self, to):
    global count
    count += 1
    if count * 2 - 1 == kill:
        os._exit(9)
    done = rename(self, to)
    if count * 2 == kill:
        os._exit(9)
    return done
Path.rename = killed
def kept(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "made")
with whole_or_nothing(target, "folder", lambda: None, kept) as folder:
    (folder / "made").write_text(who)
    print(folder.name, flush=True)
    if who == "waiting":
        sys.stdin.readline()
"""


def command(target, who, kill=0):
    return [sys.executable, "-c", WRITE, str(target), who, str(kill)]


def write(target, who, kill=0, prefix=()):
    return subprocess.run(
        [*prefix, *command(target, who, kill)], capture_output=True, text=True, cwd=ROOT
    )


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kill", range(1, 9))
def test_nothing_of_the_users_is_lost_wherever_the_process_is_killed(tmp_path, kill):
    """Two renamings put the new folder in place, two more move what is kept."""
    target = tmp_path / "out"
    (target / "notes").mkdir(parents=True)
    mine = {"notes/a": "1", "b": "2"}
    for name, text in (mine | {"made": "old"}).items():
        (target / name).write_text(text)
    assert write(target, "new", kill).returncode == 9
    everything = [c for p in tmp_path.iterdir() for c in content(p).values()]
    assert {"1", "2"} <= set(everything)
    if target.exists():
        assert content(target)["made"] in ("old", "new")
    assert write(target, "next").returncode == 0
    assert content(target) == mine | {"made": "next"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_last_renaming_is_the_eighth_place_to_be_killed_at(tmp_path):
    """So that the test above is told when there are more."""
    target = tmp_path / "out"
    (target / "notes").mkdir(parents=True)
    (target / "b").touch()
    assert write(target, "new", kill=9).returncode == 0


def unshared() -> list[str]:
    """A prefix by which a command runs as in a container: its processes count from 1."""
    prefix = ["unshare", "--map-root-user", "--pid", "--fork"]
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True)
    except OSError:
        return []
    return [] if done.returncode else prefix


@pytest.mark.parametrize("container", [False, True])
def test_what_another_process_is_writing_is_not_cleared(tmp_path, container):
    prefix = unshared() if container else []
    if container and not prefix:
        pytest.skip("nobody may unshare here")
    target = tmp_path / "out"
    with subprocess.Popen(
        [*prefix, *command(target, "waiting")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        name = process.stdout.readline().strip()
        assert write(target, "second", prefix=prefix).returncode == 0
        assert content(target) == {"made": "second"}
        assert content(tmp_path / name) == {"made": "waiting"}
        process.communicate("\n")
    assert process.returncode == 0
    assert content(target) == {"made": "waiting"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_left_by_a_process_of_any_number_is_cleared(tmp_path):
    """Earlier versions named it by the process, which is of no meaning in another container."""
    for name in (f".out.{os.getpid()}.partial", ".out.1.partial", ".out.0123456789ab.partial"):
        (tmp_path / name).mkdir()
    with whole_or_nothing(tmp_path / "out", "folder", lambda: None) as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
