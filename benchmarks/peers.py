"""Other engines on the same weights: made, run for their logits, and timed.

They need packages that nothing else here does: `pip install -e .[benchmarks]`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import edge_demo  # noqa: F401 - before onnxruntime, whose telemetry it turns off

# isort: split
import numpy as np
import onnxruntime as ort

from edge_demo.bench import Test, run_tests
from edge_demo.bundle import Bundle
from edge_demo.engine import Engine
from edge_demo.graph_weights import bytes_per_token
from edge_demo.rooms import peak_rss_bytes
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
        """Tokens a second of prefill and of decode, and the peak memory, of a fresh process."""
        done = subprocess.run(
            [sys.executable, __file__, self.kind, str(self.path)]
            + [str(n) for n in (threads, prompt, new, repeats)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class _Kind:
    engine: Callable
    speed: Callable[[Path, int, int, int, int], tuple[float, float]]
    num_bytes: Callable[[Path], int]


# --- our bundles ---


def _bundle_speed(path: Path, threads: int, prompt: int, new: int, repeats: int):
    tests = [Test("pp", prompt), Test("tg", new, prompt)]
    found = run_tests(Bundle.open(path), tests, [threads], repeats)
    prefill, decode = (statistics.median(timing.speeds) for timing in found.timings)
    return prefill, decode


# --- llama.cpp ---


class _LlamaEngine:
    context_length = _CONTEXT

    def __init__(self, path: Path, threads: int) -> None:
        self._llama = _llama(path, threads, logits_all=True)

    def rewind(self, length: int) -> None:
        assert length == 0
        self._llama.reset()

    def all_logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        self._llama.eval(ids)
        for first in range(0, len(ids), _CHUNK):
            yield self._llama.scores[first : min(first + _CHUNK, len(ids))]


def _llama(path: Path, threads: int, logits_all: bool):
    from llama_cpp import Llama

    return Llama(
        str(path),
        n_ctx=_CONTEXT,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        logits_all=logits_all,
        verbose=False,
    )


def _llama_speed(path: Path, threads: int, prompt: int, new: int, repeats: int):
    llama = _llama(path, threads, logits_all=False)
    ids = np.random.default_rng(0).integers(0, llama.n_vocab(), prompt).tolist()

    def prefill():
        llama.reset()
        llama.eval(ids)
        return llama.sample(temp=0.0)

    def decode(token):
        llama.eval([token])
        return llama.sample(temp=0.0)

    return _timed(prefill, decode, prompt, new, repeats)


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


class GenaiModel:
    """onnxruntime-genai's own export in its own generator, which takes the likeliest token."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(path))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._og = og
        self._model = og.Model(config)
        decoder = json.loads((path / "genai_config.json").read_text())["model"]["decoder"]
        self._least = decoder.get("sliding_window", {}).get("window_size", 0)
        self._generator = None

    def prefill(self, ids: Sequence[int] | np.ndarray, new: int) -> None:
        """Run a prompt and choose the first of `new` tokens."""
        self._generator = None  # its keys and values are let go first
        parameters = self._og.GeneratorParams(self._model)
        length = max(len(ids) + new, self._least)  # it cannot hold less than a window
        parameters.set_search_options(max_length=length, do_sample=False)
        self._generator = self._og.Generator(self._model, parameters)
        self._generator.append_tokens(np.asarray(ids))
        self._generator.generate_next_token()

    def decode(self) -> None:
        """Run the last token and choose the next."""
        self._generator.generate_next_token()

    @property
    def done(self) -> bool:
        """Whether the text has ended."""
        return self._generator.is_done()


def _genai_speed(path: Path, threads: int, prompt: int, new: int, repeats: int):
    model = GenaiModel(path, threads)
    vocabulary = json.loads((path / "genai_config.json").read_text())["model"]["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary, prompt)
    return _timed(
        lambda: model.prefill(ids, new + 1), lambda _: model.decode(), prompt, new, repeats
    )


def _timed(prefill: Callable, decode: Callable, prompt: int, new: int, repeats: int):
    """Medians of tokens a second, as of a bundle."""
    prefill()
    prefills, decodes = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        token = prefill()
        first = time.perf_counter()
        for _ in range(new):
            token = decode(token)
        prefills.append(first - start)
        decodes.append(time.perf_counter() - first)
    return prompt / statistics.median(prefills), new / statistics.median(decodes)


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
        _bundle_speed,
        lambda path: bytes_per_token(path / "candidates.onnx"),
    ),
    "llama.cpp": _Kind(_LlamaEngine, _llama_speed, _gguf_bytes),
    "onnxruntime-genai": _Kind(
        _GraphEngine, _genai_speed, lambda path: bytes_per_token(path / "model.onnx")
    ),
}


def _speed_of(kind: str, path: str, *counts: str) -> None:
    prefill, decode = KINDS[kind].speed(Path(path), *map(int, counts))
    print(json.dumps({"prefill": prefill, "decode": decode, "peak": peak_rss_bytes()}))


if __name__ == "__main__":
    _speed_of(*sys.argv[1:])
