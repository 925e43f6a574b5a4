"""A process does not hold pages of weights that onnxruntime has copied."""

from __future__ import annotations

import mmap
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.device import mapped_files
from edge_demo.device.mapped_files import forget_pages
from edge_demo.engine.runner import CandidateEngine

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc of Linux")


def resident_bytes(path: Path) -> int:
    """How much of a file this process holds where it is mapped."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(os.path.realpath(path)))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@linux
@pytest.mark.limits
def test_pages_of_one_file_are_let_go_and_come_back(tmp_path):
    files = [tmp_path / "with a space", tmp_path / "other"]
    content = np.random.default_rng(0).bytes(1 << 20)
    maps = []
    for path in files:
        path.write_bytes(content)
        with path.open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ))
        assert bytes(maps[-1]) == content
    before = [resident_bytes(path) for path in files]
    assert min(before) == 1 << 20
    forget_pages(files[0])
    assert [resident_bytes(path) for path in files] == [0, before[1]]
    assert bytes(maps[0]) == content


@linux
@pytest.mark.limits
@pytest.mark.parametrize("name", ["gemma-fp32", "gemma2-int8", "gemma3-int8"])
def test_an_engine_begins_without_pages_of_the_weights(tiny_bundles, name, monkeypatch):
    bundle = Bundle.open(tiny_bundles / name)
    weights = bundle.path / bundle.weights
    engine = CandidateEngine(bundle, threads=1)
    assert resident_bytes(weights) == 0
    logits = engine.prefill([2, 7, 9]).logits.copy()
    monkeypatch.setattr("edge_demo.engine.sessions.forget_pages", lambda path: None)
    other = CandidateEngine(bundle, threads=1)
    assert resident_bytes(weights) > 0
    np.testing.assert_array_equal(other.prefill([2, 7, 9]).logits, logits)


def test_where_the_system_does_not_tell_nothing_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_files, "_MAPS", tmp_path / "none")
    forget_pages(tmp_path / "weights")
