"""`export-onnx` on what goes wrong: one sentence, an exit status, and nothing left behind."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from edge_demo.bundle.reader import Bundle
from export.formats.formats import plan_bytes
from export.formats.recipes import plan_for_recipe
from gemma_keras import open_checkpoint
from gemma_keras.checkpoints.hf.config import config_from_hf
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.checkpoints.opening.sample import sample_path
from tests.gguf_files import (
    metadata,
    pack_gguf,
    pack_info,
    pack_model,
    tensors,
    vocabulary,
    write_gguf,
)

COMMAND = str(Path(sys.executable).with_name("export-onnx"))
QUICK = ("--recipe", "fp32", "--no-verify")  # starts no Keras
FAILED, REFUSED, INTERRUPTED = 1, 2, 130
META = metadata("gemma3", 2)
HF_CONFIG = {
    "model_type": "gemma3_text",
    "vocab_size": len(vocabulary()["tokenizer.ggml.tokens"]),
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 16,
    "max_position_embeddings": 128,
}


def run(*arguments, command=(COMMAND,)):
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def sentence(done, status):
    """The one line that an unsuccessful command ends with, after those about its progress."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    progress = list(itertools.takewhile(lambda line: line.endswith("…"), lines))
    assert len(lines) == len(progress) + 1, done.stderr
    assert lines[-1].startswith("export-onnx: ")
    return lines[-1]


def refusal(source, folder, *arguments, status=REFUSED):
    """Export to `folder/out`, which must fail and leave the folder empty; the sentence."""
    folder.mkdir(exist_ok=True)
    done = run(source, folder / "out", *(arguments or QUICK))
    assert list(folder.iterdir()) == []
    return sentence(done, status)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("good") / "tiny.gguf", META, tensors(META))


def write_bytes(path, data):
    path.write_bytes(data)
    return path


def test_the_small_checkpoints_are_good_as_they_are(good, tmp_path):
    for source in (good, write_hf(tmp_path / "hf"), write_hf(tmp_path / "shards", shards=3)):
        done = run(source, tmp_path / f"{source.name}.out", *QUICK, "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert Bundle.open(told["path"]).num_bytes == told["num_bytes"]
    assert not list(tmp_path.glob(".*"))


# --- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "the following arguments are required: SOURCE, OUT"),
        (("a", "b", "--nope"), "unrecognized arguments: --nope"),
        (("a", "b", "--kl-budget", "much"), "--kl-budget: invalid float value: 'much'"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(options, said):
    line = sentence(run(*options), REFUSED)
    assert said in line and line.endswith("; see export-onnx --help")


def test_a_missing_source(target):
    line = refusal("no/such/model", target)
    assert "no/such/model does not exist; give a .gguf file" in line


def test_a_kv_cache_of_another_dtype_names_those_there_are(good, target):
    line = refusal(good, target, *QUICK, "--kv-cache-dtype", "fp8")
    assert "keys and values are kept as float32 or int8, not as 'fp8'" in line


def test_standard_operators_keep_floats(good, target):
    line = refusal(good, target, *QUICK, "--kv-cache-dtype", "int8", "--lowering", "traced")
    assert "traced graphs keep keys and values as float32; use --lowering fused" in line


def test_an_unknown_recipe_names_those_there_are(good, target):
    line = refusal(good, target, "--recipe", "int3")
    assert "'int3'; choose one of int4, int8, int8-rows, int8-wide, fp16, fp32" in line


INT4 = ("--recipe", "int4")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((*INT4, "--calibration", "{missing}"), "does not exist"),
        ((*INT4, "--calibration", "{folder}"), "is not a file"),
        ((*INT4, "--calibration", "{empty}"), "empty.txt is too short to calibrate on: it has 0"),
        ((*INT4, "--calibration", "{latin1}"), "latin1.txt is not UTF-8"),
        ((*INT4, "--calibration", "{zeros}"), "it contains NUL characters"),
        (("--recipe", "fp32", "--calibration", "self"), "float recipes are not calibrated"),
        ((*INT4, "--kl-budget", "-1"), "must be a positive number, not -1"),
        ((*INT4, "--kl-budget", "nan"), "must be a positive number, not nan"),
        (("--recipe", "int8", "--kl-budget", "0.1"), "needs --recipe int4"),
        ((*INT4, "--kl-budget", "0.1", "--plan", "{plan}"), "no plan"),
        ((*INT4, "--plan", "{missing}"), "cannot be read"),
        ((*INT4, "--plan", "{latin1}"), "is not JSON"),
        ((*INT4, "--plan", "{unknown}"), "names 'layers.99.mlp.down', which this model"),
        (("--lowering", "woven"), "'woven'; choose one of fused, traced"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_calibration_budget_or_plan_that_cannot_be_used(good, target, tmp_path, options, said):
    files = {name: tmp_path / name for name in ("missing", "folder", "plan", "unknown")}
    files |= {name: tmp_path / f"{name}.txt" for name in ("empty", "latin1", "zeros")}
    files["folder"].mkdir()
    files["empty"].touch()
    files["latin1"].write_bytes("für".encode("latin-1"))
    files["zeros"].write_bytes(bytes(9000))
    files["plan"].write_text("{}")
    files["unknown"].write_text('{"layers.99.mlp.down": {"bits": 32}}')
    assert said in refusal(good, target, *(option.format(**files) for option in options))


@pytest.mark.parametrize("length", ["0", "-1", "129"])
def test_a_context_the_model_does_not_have(good, target, length):
    line = refusal(good, target, *QUICK, "--max-context", length)
    assert "the model's context of 128 tokens" in line
    assert length in line


def test_a_width_that_int8_cannot_store(target, tmp_path):
    meta = metadata("gemma", 1, embedding_length=88)
    source = write_gguf(tmp_path / "narrow.gguf", meta, tensors(meta))
    assert "hidden_dim (88); use --recipe fp32" in refusal(source, target, "--recipe", "int8")


# --- the output path -----------------------------------------------------------------------------


def contents(folder):
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def bundle(good, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle") / "out"
    assert run(good, out, *QUICK).returncode == 0
    return out


@pytest.fixture
def standing(bundle, target):
    """A copy of a bundle, alone in its folder."""
    return Path(shutil.copytree(bundle, target / "out"))


def test_an_output_folder_that_is_there_is_left_alone(good, standing):
    before = contents(standing.parent)
    line = sentence(run(good, standing, *QUICK), REFUSED)
    assert f"{standing} already exists; choose another folder, or add --overwrite" in line
    assert contents(standing.parent) == before


def test_overwrite_replaces_a_bundle(good, standing):
    assert run(good, standing, *QUICK, "--overwrite", "--max-context", 64).returncode == 0
    assert Bundle.open(standing).context_length == 64
    assert [path.name for path in standing.parent.iterdir()] == ["out"]


def test_overwrite_keeps_what_is_not_the_bundles_own(good, standing):
    """Notes, a prompt cache, a repository; and a file that has a name of the new bundle's."""
    kept = {
        "prompts.jsonl": b"mine",
        ".git/HEAD": b"ref",
        "cache/a/b": b"kept",
        "config.json": b"?",
    }
    manifest = json.loads((standing / "bundle.json").read_text())
    del manifest["files"]["config.json"]  # as where the old model had no form in that file
    (standing / "bundle.json").write_text(json.dumps(manifest))
    for name, data in kept.items():
        (standing / name).parent.mkdir(parents=True, exist_ok=True)
        (standing / name).write_bytes(data)
    before = {path.name for path in standing.iterdir()}
    assert run(good, standing, *QUICK, "--overwrite", "--max-context", 64).returncode == 0
    Bundle.open(standing).verify()
    assert Bundle.open(standing).context_length == 64
    assert {path.name for path in standing.iterdir()} == before | {"config.json.kept1"}
    assert json.loads((standing / "config.json").read_bytes())["max_position_embeddings"] == 64
    kept["config.json.kept1"] = kept.pop("config.json")
    assert {name: (standing / name).read_bytes() for name in kept} == kept


def test_overwrite_that_fails_keeps_the_bundle(standing, tmp_path):
    before = contents(standing.parent)
    broken = tensors(META)
    broken["blk.1.ffn_up.weight"][3, 4] = np.nan
    source = write_gguf(tmp_path / "broken.gguf", META, broken)
    sentence(run(source, standing, *QUICK, "--overwrite"), REFUSED)
    assert contents(standing.parent) == before


def test_overwrite_follows_a_link_to_a_bundle(good, standing, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(standing)
    done = run(good, link, *QUICK, "--overwrite", "--max-context", 64)
    assert done.returncode == 0, done.stderr
    assert link.is_symlink()
    assert Bundle.open(standing).context_length == 64
    assert [path.name for path in standing.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "the only copy"},
        {},
        {"bundle.json": '{"name": "web-app", "modules": []}', "main.js": "…"},
        {"bundle.json": '["gemma-keras-bundle"]'},
        {"bundle.json": "not JSON"},
    ],
    ids=["other files", "empty", "another bundle.json", "a list", "no JSON"],
)
def test_overwrite_touches_no_folder_that_is_not_a_bundle(good, target, files):
    (target / "out").mkdir(parents=True)
    for name, text in files.items():
        (target / "out" / name).write_text(text)
    before = contents(target)
    line = sentence(run(good, target / "out", *QUICK, "--overwrite"), REFUSED)
    assert "is not a bundle, so it will not be overwritten" in line
    assert contents(target) == before


def test_overwrite_touches_no_file(good, target):
    target.mkdir()
    file = write_bytes(target / "out", b"mine")
    line = sentence(run(good, file, *QUICK, "--overwrite"), REFUSED)
    assert "is not a bundle" in line
    assert file.read_bytes() == b"mine"


def test_an_output_path_below_a_file(good, target):
    target.mkdir()
    file = write_bytes(target / "file", b"mine")
    for out in (file / "out", file / "deep" / "out"):
        line = sentence(run(good, out, *QUICK), REFUSED)
        assert f"{file} is not a folder" in line
    assert contents(target) == {Path("file"): b"mine"}


@pytest.mark.parametrize("length", [250, 300])  # too long with our suffix, and by itself
def test_an_output_name_too_long_for_the_file_system(good, target, length):
    target.mkdir()
    out = target / ("x" * length)
    line = sentence(run(good, out, *QUICK), FAILED)
    assert f"cannot write {out}: File name too long" in line
    assert contents(target) == {}


def test_an_output_path_where_nothing_can_be_made(good):
    sentence(run(good, "/proc/gemma/out", *QUICK), FAILED)


# --- space ---------------------------------------------------------------------------------------

# A file system of its own for one command, gone with it; what is left there goes to stdout.
_IN_A_NAMESPACE = """
mount -t tmpfs -o "$1" tmpfs "$2" && cd "$2" && shift 2 && "$@"
status=$?
ls -A .
exit $status
"""
NAMESPACE = ("unshare", "--map-root-user", "--mount", "sh", "-c", _IN_A_NAMESPACE, "sh")


def _mount_options():
    """What to mount `tmpfs` with, by name; nothing where nobody may mount."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run([*NAMESPACE, "size=1m", folder, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return {}
    weights = plan_bytes(plan_for_recipe("fp32", _config()), _config())
    return {
        "too small": (f"size={weights}", "the bundle needs about"),
        "not writable": ("ro,size=1g", "Read-only file system"),
        "too many files": ("nr_inodes=4", "no space was left while writing"),
        # enough by the estimate, which does not know that this tokenizer has 17 MB
        "full before the end": (f"size={weights + (16 << 20) + (256 << 10)}", "no space was left"),
    }


def _config():
    return config_from_hf(HF_CONFIG)


@pytest.mark.parametrize(("options", "expected"), _mount_options().values(), ids=_mount_options())
def test_a_file_system_that_does_not_take_the_bundle(tmp_path, target, options, expected):
    source = write_hf(tmp_path / "hf")
    with (source / "tokenizer.model").open("ab") as file:
        # field 1000 of the protobuf, which SentencePiece does not know and passes over
        length = 17 << 20
        varint = bytes(
            [length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14 & 0x7F | 0x80]
        )
        file.write(b"\xc2\x3e" + varint + bytes([length >> 21]) + bytes(length))
    target.mkdir()
    command = (*NAMESPACE, options, str(target), COMMAND)
    line = sentence(run(source, "out", *QUICK, command=command), FAILED)
    assert expected in line
    if "no space" in expected:
        assert f"{target}/out; nothing was kept there" in line


def test_a_file_that_may_not_grow_so_long(good, target):
    """What a quota or a file system's limit does, in the middle of the weights."""
    target.mkdir()
    limited = ("sh", "-c", 'ulimit -f 256 && exec "$@"', "sh", COMMAND)  # at most 256 KB
    line = sentence(run(good, target / "out", *QUICK, command=limited), FAILED)
    assert f"cannot write {target}/out: File too large" in line
    assert contents(target) == {}


def test_a_bundle_larger_than_the_disk_is_refused_before_anything_is_written(target, tmp_path):
    """The checkpoint is a file of holes with a MLP that wide."""
    free = shutil.disk_usage(tmp_path).free
    ffw_dim = free // (3 * 96 * 4) * 32 // 31
    meta = metadata("gemma3", 1, feed_forward_length=ffw_dim)
    infos, end = [], 0
    for name, array in tensors(metadata("gemma3", 1)).items():
        shape = [ffw_dim if size == 160 else size for size in array.shape]
        infos.append(pack_info(name, reversed(shape), 0, end))
        end += -(-int(np.prod(shape)) * 4 // 32) * 32
    header = pack_gguf(meta, infos)
    source = write_bytes(tmp_path / "wide.gguf", header)
    os.truncate(source, len(header) + end)
    line = refusal(source, target, status=FAILED)
    assert "the bundle needs about" in line
    assert f"{target} has" in line


# --- interruptions -------------------------------------------------------------------------------


def interrupt(folder, number):
    """Export the sample to `folder/out`, stopped by a signal while weights are being stored."""
    folder.mkdir(exist_ok=True)
    # SIGINT may be ignored in a process whose parent ran in the background
    code = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from export.cli import main
sys.exit(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, "sample", str(folder / "out"), *QUICK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        told = ""
        while "storing the weights" not in told:
            line = process.stderr.readline()
            assert line, told
            told += line
        assert [path.suffix for path in folder.iterdir()] == [".partial"]
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, told + err)


@pytest.mark.sample
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_interrupted_export_leaves_nothing(target, number):
    line = sentence(interrupt(target, number), INTERRUPTED)
    assert line == "export-onnx: interrupted; nothing was kept"
    assert contents(target) == {}


@pytest.mark.sample
def test_what_a_killed_export_leaves_is_cleared_by_the_next(good, target):
    assert interrupt(target, signal.SIGKILL).returncode == -signal.SIGKILL
    (left,) = target.iterdir()
    assert left.name.startswith(".out.")
    assert run(good, target / "out", *QUICK).returncode == 0
    assert [path.name for path in target.iterdir()] == ["out"]
    Bundle.open(target / "out").verify()


def test_a_folder_of_another_name_is_not_cleared(good, target):
    other = target / ".out.notes.partial"
    other.mkdir(parents=True)
    assert run(good, target / "out", *QUICK).returncode == 0
    assert set(target.iterdir()) == {other, target / "out"}


# --- GGUF ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"GGUF", b"PK\x03\x04" + bytes(99), b"\n" * 5000], ids=len)
def test_a_file_that_is_not_gguf(target, tmp_path, data):
    source = write_bytes(tmp_path / "other.gguf", data)
    assert f"{source} is not a GGUF file" in refusal(source, target)


def test_a_gguf_that_is_cut_short(good, target, tmp_path):
    data = good.read_bytes()
    places = [30, 99, *np.linspace(500, len(data) - 1, 8).astype(int)]
    for place in places:
        source = write_bytes(tmp_path / "cut.gguf", data[:place])
        assert "truncated" in refusal(source, target), place


@pytest.mark.sample
def test_the_sample_cut_short(target, tmp_path):
    source = tmp_path / "sample.gguf"
    shutil.copyfile(sample_path(), source)
    size = source.stat().st_size
    for place in (size - 1, size // 2, 3 << 20, 1000):
        os.truncate(source, place)
        assert "truncated" in refusal(source, target), place


def gguf_that_lies(kind):
    arrays = tensors(META)
    infos = [pack_info(name, reversed(a.shape), 0, 0) for name, a in arrays.items()]
    zeros = bytes(1 << 20)
    match kind:
        case "number of tensors":
            return pack_gguf(META, infos, zeros, num_tensors=1 << 60)
        case "number of keys":
            return pack_gguf(META, infos, zeros, num_keys=1 << 60)
        case "size of a tensor":
            infos[1] = pack_info("blk.0.attn_norm.weight", [1 << 39])
            return pack_gguf(META, infos, zeros)
        case "place of a tensor":
            infos[1] = pack_info("blk.0.attn_norm.weight", [96], 0, 1 << 62)
            return pack_gguf(META, infos, zeros)
        case "width of the MLP":
            return pack_model(metadata("gemma3", 2, feed_forward_length=192), arrays)
        case "number of layers":
            return pack_model(metadata("gemma3", 1 << 30), arrays)
        case "number of heads":
            return pack_model(metadata("gemma3", 2, attention__head_count=8), arrays)
        case "size of the vocabulary":
            meta = META | {
                key: value[:-1]
                for key, value in META.items()
                if key.startswith("tokenizer.ggml.") and isinstance(value, list)
            }
            return pack_model(meta, arrays)
    raise ValueError(kind)


@pytest.mark.parametrize(
    ("kind", "expected"),
    {
        "number of tensors": "1,152,921,504,606,846,976 entries",
        "number of keys": "1,152,921,504,606,846,976 entries",
        "size of a tensor": "tensor blk.0.attn_norm.weight",
        "place of a tensor": "tensor blk.0.attn_norm.weight",
        "width of the MLP": "blk.0.ffn_gate.weight has shape [160, 96]",
        "number of layers": "1,073,741,824 layers",
        "number of heads": "blk.0.attn_q.weight has shape [128, 96]",
        "size of the vocabulary": "token_embd.weight has shape",
    }.items(),
)
def test_a_gguf_that_declares_what_it_does_not_hold(target, tmp_path, kind, expected):
    source = write_bytes(tmp_path / "lie.gguf", gguf_that_lies(kind))
    assert expected in refusal(source, target)


@pytest.mark.parametrize("recipe", [QUICK, ("--recipe", "int8")], ids=["fp32", "int8"])
def test_weights_that_are_not_finite_are_named(target, tmp_path, recipe):
    arrays = tensors(META)
    arrays["blk.1.ffn_up.weight"][3, 4] = np.inf
    source = write_gguf(tmp_path / "inf.gguf", META, arrays)
    line = refusal(source, target, *recipe)
    assert "the tensor blk.1.ffn_up.weight holds values that are not finite" in line


# --- Hugging Face folders ------------------------------------------------------------------------


def write_hf(folder, *, shards=1, **config):
    """A folder as transformers writes it, of random weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | config))
    rng = np.random.default_rng(0)
    arrays = {
        spec.hf: rng.normal(size=spec.file_shape).astype(np.float32)
        for spec in weight_specs(_config()).values()
    }
    if shards == 1:
        safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    else:
        index = {}
        for i in range(shards):
            name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = dict(itertools.islice(arrays.items(), i, None, shards))
            safetensors.numpy.save_file(part, folder / name)
            index |= dict.fromkeys(part, name)
        write_index(folder, index)
    (folder / "tokenizer.model").write_bytes(_tokenizer())
    return folder


def write_index(folder, weight_map):
    data = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(data)


def _tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        path = write_gguf(Path(folder) / "tiny.gguf", META, tensors(META))
        return open_checkpoint(path).tokenizer_model


def test_a_folder_without_a_configuration(target, tmp_path):
    assert "config.json does not exist" in refusal(tmp_path, target)


def test_a_configuration_that_is_not_json(target, tmp_path):
    source = write_hf(tmp_path / "hf")
    (source / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(source, target)


def test_another_model(target, tmp_path):
    source = write_hf(tmp_path / "hf", model_type="llama")
    assert "model_type 'llama', which is not supported" in refusal(source, target)


def test_an_unknown_key_of_the_configuration_is_named(target, tmp_path):
    source = write_hf(tmp_path / "hf", altup_num_inputs=4)
    assert "keys this project does not know: altup_num_inputs" in refusal(source, target)


def test_a_folder_without_a_tokenizer(target, tmp_path):
    source = write_hf(tmp_path / "hf")
    (source / "tokenizer.model").write_bytes(b"")
    assert "tokenizer.model is not a SentencePiece model" in refusal(source, target)
    (source / "tokenizer.model").unlink()
    assert "no tokenizer, and a bundle needs one" in refusal(source, target, status=FAILED)


@pytest.mark.parametrize("data", [b"\x00" * 64, b"not a protobuf", b'{"model": {}}'], ids=len)
def test_a_tokenizer_that_is_none(target, tmp_path, data):
    source = write_hf(tmp_path / "hf")
    (source / "tokenizer.model").write_bytes(data)
    assert "tokenizer.model is not a SentencePiece model" in refusal(source, target)


@pytest.mark.parametrize("recipe", [QUICK, ("--recipe", "int8")], ids=["fp32", "int8"])
def test_a_tokenizer_without_a_beginning_of_sequence(target, tmp_path, recipe):
    source = write_hf(tmp_path / "hf")
    tokenizer = (source / "tokenizer.model").read_bytes()
    (source / "tokenizer.model").write_bytes(tokenizer.replace(b"<bos>", b"<BOS>", 1))
    line = refusal(source, target, *recipe, status=FAILED)
    assert "beginning-of-sequence" in line


def test_a_missing_shard_is_named(target, tmp_path):
    source = write_hf(tmp_path / "hf", shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    line = refusal(source, target)
    assert "lacks the shard model-00002-of-00003.safetensors" in line


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 7])
def test_a_shard_outside_the_folder(target, tmp_path, name):
    source = write_hf(tmp_path / "hf")
    shutil.copy(source / "model.safetensors", tmp_path)
    write_index(source, {"model.norm.weight": name})
    line = refusal(source, target)
    assert "names a file outside its folder" in line
    assert repr(name) in line


@pytest.mark.parametrize("length", [0, 7, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_safetensors_header_with_another_length(target, tmp_path, length):
    source = write_hf(tmp_path / "hf")
    file = source / "model.safetensors"
    write_bytes(file, length.to_bytes(8, "little") + file.read_bytes()[8:])
    line = refusal(source, target)
    assert "model.safetensors cannot be read as safetensors" in line


def test_a_safetensors_file_that_is_cut_short(target, tmp_path):
    source = write_hf(tmp_path / "hf")
    file = source / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    assert "model.safetensors cannot be read as safetensors" in refusal(source, target)


def test_a_missing_tensor_is_named(target, tmp_path):
    source = write_hf(tmp_path / "hf")
    arrays = safetensors.numpy.load_file(source / "model.safetensors")
    del arrays["model.layers.1.mlp.up_proj.weight"]
    safetensors.numpy.save_file(arrays, source / "model.safetensors")
    assert "lacks the tensor model.layers.1.mlp.up_proj.weight" in refusal(source, target)


def test_pickled_weights_are_not_read(target, tmp_path):
    source = write_hf(tmp_path / "hf")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "has neither model.safetensors nor" in refusal(source, target)
