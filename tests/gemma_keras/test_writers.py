"""What can go wrong while a checkpoint is written, in either format."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from gemma_keras import open_checkpoint
from gemma_keras.checkpoints.gguf.writer import write_gguf
from gemma_keras.checkpoints.hf.writer import write_safetensors_folder
from gemma_keras.checkpoints.source import table_chunks
from gemma_keras.errors import CheckpointError
from tests.export.test_bad_input import NAMESPACE
from tests.gemma_keras.writers import WRITERS, for_gguf


@pytest.fixture
def tiny(sources):
    return for_gguf(open_checkpoint(sources("gemma3", "bfloat16")))


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_target_that_is_taken(tiny, tmp_path, writer):
    target = tmp_path / "out"
    writer(tiny, target)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"out already exists; choose another"):
        writer(tiny, target)
    assert contents(tmp_path) == before
    zeros = {name: np.zeros_like(array) for name, array in tiny.weights.items()}
    writer(dataclasses.replace(tiny, weights=zeros), target, overwrite=True)
    after = contents(tmp_path)
    assert after.keys() == before.keys() and after != before
    assert not open_checkpoint(target).weights["layers.1.mlp.up"].any()


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_target_of_another_kind_is_not_overwritten(tiny, tmp_path, writer):
    folder = tmp_path / "letters"
    (folder / "to").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("dear")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="will not be overwritten"):
        writer(tiny, folder, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_checkpoint_may_replace_the_one_it_is_read_from(tiny, tmp_path, writer):
    writer(tiny, tmp_path / "out")
    before = contents(tmp_path)
    again = open_checkpoint(tmp_path / "out")
    again = dataclasses.replace(again, provenance=tiny.provenance)
    writer(again, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_unknown_types_are_named(tiny, tmp_path, writer):
    with pytest.raises(CheckpointError, match=r"is 'int3'; choose one of .*16"):
        writer(tiny, tmp_path / "out", "int3")
    with pytest.raises(CheckpointError, match="max_shard_bytes must be positive, found 0"):
        write_safetensors_folder(tiny, tmp_path / "out", max_shard_bytes=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("writer", "kind", "value"),
    [
        (write_safetensors_folder, "float16", 7e4),
        (write_safetensors_folder, "bfloat16", 3.4e38),
        (write_safetensors_folder, "float32", np.inf),
        (write_gguf, "f16", 7e4),
        (write_gguf, "bf16", 3.4e38),
        (write_gguf, "q8_0", 1e7),
        (write_gguf, "f32", np.nan),
    ],
)
def test_a_number_beyond_the_type_is_refused(tiny, tmp_path, writer, kind, value):
    weights = dict(tiny.weights)
    weights["layers.2.mlp.down"] = weights["layers.2.mlp.down"].copy()
    weights["layers.2.mlp.down"][3, 4] = value
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.down holds .* write another type"):
        writer(dataclasses.replace(tiny, weights=weights), tmp_path / "out", kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["token_embedding", "layers.1.attention.key", "final_norm"])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_weights_that_do_not_fit_are_refused(tiny, tmp_path, writer, name):
    weights = dict(tiny.weights)
    array = weights.pop(name)
    with pytest.raises(CheckpointError, match=f"the weights lack {name}"):
        writer(dataclasses.replace(tiny, weights=weights), tmp_path / "out")
    for wrong in (array[:-1], np.concatenate([array, array]), array[..., None]):
        with pytest.raises(CheckpointError, match=f"{name} must have the shape"):
            writer(dataclasses.replace(tiny, weights=weights | {name: wrong}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_replaced_keeps_what_is_no_checkpoints(tiny, tmp_path):
    write_safetensors_folder(tiny, tmp_path / "out")
    before = {path.name for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "training.log").write_text("mine")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("of another")
    write_safetensors_folder(tiny, tmp_path / "out", overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == before | {"training.log"}
    assert (tmp_path / "out" / "training.log").read_text() == "mine"


@pytest.mark.parametrize("name", ["../TERMS", "config.json", "", "a/b"])
def test_a_notice_keeps_to_a_name_of_its_own(tiny, tmp_path, name):
    with pytest.raises(CheckpointError, match="must be a plain file name"):
        write_safetensors_folder(dataclasses.replace(tiny, notices={name: b"x"}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_an_interrupted_write_leaves_nothing(tiny, tmp_path, writer):
    names = []

    def interrupt(done, total):
        names.extend(path.name for path in tmp_path.iterdir())
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer(tiny, tmp_path / "out", on_progress=interrupt)
    (name,) = set(names)
    assert re.fullmatch(r"\.out\.[0-9a-f]{12}\.partial", name)
    assert not list(tmp_path.iterdir())


# Run as `python -c SCRIPT source target writer`: killed halfway if the environment says so.
SCRIPT = """
import os, shutil, sys
from gemma_keras import open_checkpoint
from gemma_keras.checkpoints.gguf.writer import write_gguf
from gemma_keras.checkpoints.hf.writer import write_safetensors_folder

def told(done, total):
    if "KILL" in os.environ and done > total // 2:
        os._exit(9)

if "BLIND" in os.environ:
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 50, 0, 1 << 50)
source, target, writer = sys.argv[1:]
write = {"safetensors": write_safetensors_folder, "gguf": write_gguf}[writer]
try:
    write(open_checkpoint(source), target, on_progress=told)
except ValueError as error:
    sys.exit(f"refused: {error}")
"""


def run(*arguments, prefix=(), **environment):
    return subprocess.run(
        [*prefix, sys.executable, "-c", SCRIPT, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_killed_write_leaves_is_cleared_by_the_next(sources, tiny, tmp_path, writer):
    done = run(sources("gemma", "float32"), tmp_path / "out", writer, KILL="1")
    assert done.returncode == 9, done.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    WRITERS[writer](tiny, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "blind", "expected"),
    [
        ("size=300k", False, "out needs about 1"),
        ("size=300k", True, "no space was left while writing out; nothing was kept there"),
        ("ro,size=1g", False, "cannot write out: Read-only file system"),
    ],
    ids=["too small", "full before the end", "not writable"],
)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_system_that_does_not_take_it(sources, tmp_path, writer, options, blind, expected):
    target = tmp_path / "disk"
    target.mkdir()
    prefix = (*NAMESPACE, options, str(target))
    if subprocess.run([*NAMESPACE, "size=1m", target, "true"], capture_output=True).returncode:
        pytest.skip("nobody may mount here")
    source = sources("gemma", "float32")  # the one here that GGUF can say
    done = run(source, "out", writer, prefix=prefix, **({"BLIND": "1"} if blind else {}))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"refused: {expected}"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""  # what is left there


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_place_where_nothing_can_be_made(tiny, tmp_path, writer):
    for target in ("/proc/gemma/out", tmp_path / ("x" * 250)):
        with pytest.raises(CheckpointError, match=r"cannot write|/proc has 0 MB free"):
            writer(tiny, target)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is not a folder, so"):
        writer(tiny, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_table_is_never_whole_in_memory(tiny, tmp_path):
    class Table(dict):
        def table_chunks(self, name, chunk_bytes):
            for first in range(0, 1 << 18, 1 << 14):
                yield first, np.full((1 << 14, 96), first >> 14, np.float32)

    config = dataclasses.replace(tiny.config, vocabulary_size=1 << 18)
    weights = Table(tiny.weights)
    large = dataclasses.replace(tiny, config=config, weights=weights, tokenizer_model=None)
    tracemalloc.start()
    write_safetensors_folder(large, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.3 * (1 << 18) * 96 * 4
    written = open_checkpoint(tmp_path / "out").weights
    rows = [rows[0, 0] for _, rows in table_chunks(written, "token_embedding", 4 * 96 << 14)]
    assert rows == list(range(16))


def test_bfloat16_is_read_by_a_process_that_knows_nothing_of_it(sources):
    """numpy has no bfloat16 of its own; here another package has taught it already."""
    code = "import sys; from gemma_keras import open_checkpoint\n"
    code += "print(open_checkpoint(sys.argv[1]).weights['final_norm'].dtype)"
    source = str(sources("gemma3", "bfloat16"))
    done = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True)
    assert done.stdout == "float32\n", done.stderr
