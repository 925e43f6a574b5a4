"""Other engines on the same weights: made, run for their logits, and timed by `alone.py`.

They need packages that nothing else here does: `pip install -e .[benchmarks]`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import edge_demo  # noqa: F401 - before onnxruntime, whose telemetry it turns off

# isort: split
import numpy as np
import onnxruntime as ort

from edge_demo.bundle.graph_weights import bytes_per_token
from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from gemma_keras import open_checkpoint
from gemma_keras.checkpoints.names import weight_specs

_CHUNK = 64  # positions whose logits are yielded at once, as `Engine.all_logits` does
_CONTEXT = 1024
_LLAMA_FORMATS = {"Q8_0": 7, "Q4_0": 2}  # `enum llama_ftype` of llama.h
_ECOSYSTEM_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclasses.dataclass(frozen=True)
class Contender:
    """One engine on one form of the weights.

    Attributes:
        name: for people.
        kind: one of `KINDS`.
        path: what is timed.
        quality_path: what gives logits at all positions, if that is another file.
    """

    name: str
    kind: str
    path: Path
    quality_path: Path | None = None

    def bytes_per_token(self) -> int:
        """Of weights that one step of decoding reads."""
        return KINDS[self.kind].num_bytes(self.path)

    def logits(self, threads: int):
        """An object with `rewind`, `all_logits` and `context_length`, as `Engine` has them."""
        return KINDS[self.kind].engine(self.quality_path or self.path, threads)

    def speed(self, threads: int, prompt: int, new: int, repeats: int) -> dict[str, float]:
        """Speeds and peak memory of a fresh process, as `alone`."""
        return alone(self.kind, self.path, threads=threads, prompt=prompt, new=new, repeats=repeats)


def alone(kind: str, path: Path, **options: Any) -> dict[str, float]:
    """What `alone.py` measures in a fresh process.

    Args:
        kind: one of `KINDS`.
        path: of the model.
        options: those of `alone.py`.
    """
    command = [sys.executable, str(Path(__file__).with_name("alone.py")), kind, str(path)]
    command += [f"--{name}={json.dumps(value)}" for name, value in options.items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class _Kind:
    engine: Callable
    num_bytes: Callable[[Path], int]


# --- llama.cpp ---


class _LlamaEngine:
    context_length = _CONTEXT

    def __init__(self, path: Path, threads: int) -> None:
        from llama_cpp import Llama

        self._llama = Llama(
            str(path),
            n_ctx=_CONTEXT,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            logits_all=True,
            verbose=False,
        )

    def rewind(self, length: int) -> None:
        assert length == 0
        self._llama.reset()

    def all_logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        self._llama.eval(ids)
        for first in range(0, len(ids), _CHUNK):
            yield self._llama.scores[first : min(first + _CHUNK, len(ids))]


def _gguf_bytes(path: Path) -> int:
    from gguf import GGUFReader

    tensors = {t.name: int(t.n_bytes) for t in GGUFReader(path).tensors}
    if "output.weight" in tensors:  # of the embedding, only a row is looked up
        tensors.pop("token_embd.weight")
    return sum(tensors.values())


def requantized(source: Path, name: str, out: Path) -> Path:
    """llama.cpp's own quantization of a GGUF file that is quantized already."""
    if not out.exists():
        import llama_cpp

        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = _LLAMA_FORMATS[name]
        params.allow_requantize = True
        partial = out.with_suffix(".part")
        status = llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(partial), ctypes.byref(params)
        )
        if status:
            raise RuntimeError(f"llama.cpp could not write {out}: {status}")
        partial.replace(out)
    return out


# --- onnxruntime-genai ---


class _GraphEngine:
    """The graph that onnxruntime-genai's builder writes, run for the logits at all positions."""

    context_length = _CONTEXT

    def __init__(self, path: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        self._session = ort.InferenceSession(path / "model.onnx", options)
        decoder = json.loads((path / "genai_config.json").read_text())["model"]["decoder"]
        self._past = decoder["num_key_value_heads"], 0, decoder["head_size"]

    def rewind(self, length: int) -> None:
        assert length == 0

    def all_logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        feed = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
        }
        for value in self._session.get_inputs():
            if value.name.startswith("past_key_values."):
                feed[value.name] = np.zeros((1, *self._past), np.float32)
        known = {value.name for value in self._session.get_inputs()}
        feed = {name: array for name, array in feed.items() if name in known}
        logits = self._session.run(["logits"], feed)[0][0]
        for first in range(0, len(ids), _CHUNK):
            yield logits[first : first + _CHUNK]


def genai_export(source: str, reference: Path, out: Path, pruned: bool) -> Path:
    """onnxruntime-genai's own int4 export of the same weights, by its defaults.

    Args:
        source: a checkpoint.
        reference: a bundle of it, whose configuration and tokenizer go with the weights.
        out: the folder to write.
        pruned: whether only the last position gets logits, which is faster; otherwise caches have
            full length.
    """
    if not out.exists():
        folder = out.parent / "huggingface"
        if not folder.exists():
            _write_huggingface(source, reference, folder)
        partial = out.with_suffix(".part")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", folder, "-o", partial, "-p", "int4", "-e", "cpu"]
        command += ["-c", out.parent / "cache"]
        # A cache of the window's length cannot start empty, as it does for logits.
        option = "prune_lm_head=true" if pruned else "windowed_kv_cache=false"
        command += ["--extra_options", option]
        shutil.rmtree(partial, ignore_errors=True)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([str(part) for part in command], check=True, **quiet)
        partial.replace(out)
    return out


def _write_huggingface(source: str, reference: Path, folder: Path) -> None:
    from safetensors.numpy import save_file

    checkpoint = open_checkpoint(source)
    tensors = {
        spec.hf: np.ascontiguousarray(spec.to_file(checkpoint.weights[spec.name], "hf"))
        for spec in weight_specs(checkpoint.config).values()
    }
    folder.mkdir()
    for name in _ECOSYSTEM_FILES:
        (folder / name).write_bytes((reference / name).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    if local := config.get("rope_local_base_freq"):
        # The builder of 0.18 reads these from one flat place, transformers 5 from two nested ones.
        local, everywhere = (
            {"rope_type": "default", "rope_theta": theta} for theta in (local, config["rope_theta"])
        )
        config["rope_parameters"] = everywhere | {
            "sliding_attention": local,
            "full_attention": everywhere,
            "rope_local_base_freq": local["rope_theta"],
        }
        (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


KINDS = {
    "bundle": _Kind(
        lambda path, threads: Engine(Bundle.open(path), threads),
        lambda path: bytes_per_token(path / "candidates.onnx"),
    ),
    "llama.cpp": _Kind(_LlamaEngine, _gguf_bytes),
    "onnxruntime-genai": _Kind(_GraphEngine, lambda path: bytes_per_token(path / "model.onnx")),
}
