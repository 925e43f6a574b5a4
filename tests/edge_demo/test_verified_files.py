"""What is remembered of checked files hides no change, and may be lost."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path

import numpy as np
import pytest

from edge_demo.bundle import verified_files
from edge_demo.bundle.reader import Bundle
from edge_demo.errors import BundleError
from tests.edge_demo.bundle_files import (
    assert_refused,
    declare,
    edit_manifest,
    flip_byte,
    read_manifest,
    rewrite,
    use,
)


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """The file of checked files, which even small files now go into."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified_files, "_LARGE", 1000)
    return tmp_path / "cache/gemma-keras/verified.json"


def keep_time(file, change):
    """Change a file and set its times back."""
    before = file.stat()
    change(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["engine.onnx", "model.onnx_data", "tokenizer.model"])
def test_a_byte_changed_after_a_good_run_is_noticed_even_if_the_time_is_set_back(
    damaged, memory, name
):
    use(damaged)
    assert str((damaged / name).resolve()) in json.loads(memory.read_text())
    keep_time(damaged / name, flip_byte)
    assert_refused(damaged, name, "has changed")


def test_a_file_replaced_by_another_of_the_same_size_and_time_is_noticed(damaged, memory):
    use(damaged)

    def replace(file):
        other = file.with_suffix(".new")
        other.write_bytes(bytes(file.stat().st_size))
        other.rename(file)

    keep_time(damaged / "model.onnx_data", replace)
    assert_refused(damaged, "model.onnx_data", "has changed")


def test_a_remembered_file_is_not_read_again_unless_asked(damaged, memory):
    use(damaged)
    file = damaged / "model.onnx_data"
    flip_byte(file)
    entries = json.loads(memory.read_text())
    stat = file.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    entries[str(file.resolve())][:4] = stamp  # only whoever may write the memory can do this
    memory.write_text(json.dumps(entries))
    Bundle.open(damaged).verify()
    with pytest.raises(BundleError, match="has changed"):
        Bundle.open(damaged).verify(use_memory=False)


def test_another_bundle_of_the_same_name_is_not_taken_for_the_one_that_was_checked(
    damaged, memory, tiny_bundles
):
    use(damaged)
    stale = read_manifest(damaged)["files"]["model.onnx_data"]["sha256"]
    rewrite(damaged, "model.onnx_data", bytes((damaged / "model.onnx_data").stat().st_size))
    Bundle.open(damaged).verify()
    edit_manifest(damaged, lambda m: m["files"]["model.onnx_data"].update(sha256=stale))
    assert_refused(damaged, "model.onnx_data", "has changed")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"5",
        b"[1]",
        b"[[1, 2]]",
        b'{"a": 1}',
        b"\xff",
        b"[" * 100_000,
        b"null",
        b"9" * 5000,
    ],
    ids=range(10),
)
def test_a_damaged_memory_is_ignored_and_written_anew(damaged, memory, content):
    memory.parent.mkdir(parents=True)
    memory.write_bytes(content)
    use(damaged)
    assert str((damaged / "model.onnx_data").resolve()) in json.loads(memory.read_text())
    flip_byte(damaged / "model.onnx_data")
    assert_refused(damaged, "model.onnx_data")


@pytest.mark.parametrize(
    "home", ["/dev/null", "/proc/nowhere", "read-only", "a folder in its place"]
)
def test_a_memory_that_cannot_be_written_costs_nothing_but_time(
    damaged, memory, monkeypatch, tmp_path, home
):
    if home == "read-only":
        home = tmp_path / "read-only"
        home.mkdir(mode=0o500)
    elif home == "a folder in its place":
        home = tmp_path / "cache"
        memory.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    use(damaged)
    use(damaged)
    flip_byte(damaged / "model.onnx_data")
    assert_refused(damaged, "model.onnx_data")
    # root may write to what is read-only, but nothing unfinished is left
    assert {path.name for path in tmp_path.rglob("*verified*")} <= {"verified.json"}


def test_a_user_without_a_home_can_run_a_bundle(damaged, memory, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as in a container with a made-up user id
    use(damaged)
    assert not Path("~").exists()


def test_the_memory_forgets_the_oldest(damaged, memory, tmp_path):
    declared = damaged / "more.bin"
    for i in range(70):
        path = tmp_path / f"b{i}"
        path.mkdir()
        declared = path / "model.onnx_data"
        declared.write_bytes(np.random.default_rng(i).bytes(300 * 96 * 4))
        (path / "bundle.json").write_bytes((damaged / "bundle.json").read_bytes())
        edit_manifest(path, lambda m: m.update(files={}))
        declare(path, "model.onnx_data")
        for name in ("engine.onnx", "candidates.onnx", "tokenizer.model"):
            (path / name).write_bytes(b"")
            declare(path, name)
        Bundle.open(path).verify()
    entries = json.loads(memory.read_text())
    assert len(entries) == 64 and str(declared.resolve()) in entries
    assert str((tmp_path / "b0/model.onnx_data").resolve()) not in entries
