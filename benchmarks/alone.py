"""One engine, alone in its process: a prompt, then greedy tokens, timed, and the peak memory.

    python benchmarks/alone.py llama.cpp MODEL.gguf --prompt 512 --new 64

`peers.py` starts it for each contender. Every engine does the same work by its quickest documented
way: it loads the model and the tokenizer, runs the prompt and chooses the likeliest token, then
runs each token and chooses the next. Nothing is imported that only another engine needs, so the
peak memory is this engine's. Prints one JSON line: tokens a second (medians), seconds to load, and
the peak resident bytes.

llama.cpp is called through the low-level functions of llama-cpp-python, as llama-bench calls it.
The class `Llama` is not used: it fills a row of logits in Python for every token. llama-bench
chooses no token; here the maximum of llama.cpp's own buffer of logits does, the quickest way
found. onnxruntime-genai is called as its own benchmark calls it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Model(Protocol):
    """An engine that has loaded a model and its tokenizer."""

    vocabulary_size: int

    def begin(self, ids: np.ndarray, new: int) -> None:
        """Forget the text before; what comes next is a prompt of these ids and `new` tokens."""
        ...

    def prefill(self) -> int:
        """Run the prompt; the likeliest next token."""
        ...

    def decode(self, token: int) -> int:
        """Run a token; the likeliest next one."""
        ...


class BundleModel:
    """This project's engine."""

    def __init__(self, path: Path, threads: int, length: int) -> None:
        from edge_demo import Bundle, Sampler
        from edge_demo.text.generator import engine_for
        from edge_demo.text.tokenizer import Tokenizer

        bundle = Bundle.open(path)
        self._sampler = Sampler()
        self._engine = engine_for(bundle, self._sampler, threads)
        self._tokenizer = Tokenizer(bundle)
        self.vocabulary_size = bundle.vocabulary_size

    def begin(self, ids: np.ndarray, new: int) -> None:
        """As `Model.begin`."""
        self._engine.rewind(0)
        self._ids = ids.tolist()

    def prefill(self) -> int:
        """As `Model.prefill`."""
        return self._sampler.pick(self._engine.prefill(self._ids))

    def decode(self, token: int) -> int:
        """As `Model.decode`."""
        return self._sampler.pick(self._engine.decode(token))


class LlamaModel:
    """llama.cpp: `llama_decode`, and the maximum of the logits that it leaves in its buffer."""

    def __init__(self, path: Path, threads: int, length: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            os.fsencode(path), llama_cpp.llama_model_default_params()
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = length
        options.n_batch = options.n_ubatch = 512
        options.n_outputs_max = 1
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def begin(self, ids: np.ndarray, new: int) -> None:
        """As `Model.begin`."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        self._ids = np.ascontiguousarray(ids, np.int32)

    def prefill(self) -> int:
        """As `Model.prefill`."""
        for first in range(0, len(self._ids), 512):
            self._run(self._ids[first : first + 512])
        return self._choose()

    def decode(self, token: int) -> int:
        """As `Model.decode`."""
        self._run(np.array([token], np.int32))
        return self._choose()

    def _run(self, ids: np.ndarray) -> None:
        pointer = ids.ctypes.data_as(self._lib.llama_token_p)
        status = self._lib.llama_decode(
            self._context, self._lib.llama_batch_get_one(pointer, len(ids))
        )
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _choose(self) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary_size,)).argmax())


class GenaiModel:
    """onnxruntime-genai's own generator over its own export."""

    def __init__(self, path: Path, threads: int, length: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(path))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._og = og
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)
        model = json.loads((path / "genai_config.json").read_text())["model"]
        self.vocabulary_size = model["vocab_size"]
        self._least = model["decoder"].get("sliding_window", {}).get("window_size", 0)
        self._generator = None

    def begin(self, ids: np.ndarray, new: int) -> None:
        """As `Model.begin`."""
        self._generator = None  # its keys and values are let go first
        parameters = self._og.GeneratorParams(self._model)
        length = max(len(ids) + new + 1, self._least)  # it cannot hold less than a window
        # At the end of a text its generator would do nothing.
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        self._generator = self._og.Generator(self._model, parameters)
        self._ids = ids

    def prefill(self) -> int:
        """As `Model.prefill`; the generator keeps the token."""
        self._generator.append_tokens(self._ids)
        return self.decode(0)

    def decode(self, token: int) -> int:
        """As `Model.decode`, of the token that the generator kept."""
        self._generator.generate_next_token()
        return token


MODELS: dict[str, Callable[[Path, int, int], Model]] = {
    "bundle": BundleModel,
    "llama.cpp": LlamaModel,
    "onnxruntime-genai": GenaiModel,
}


def measure(
    kind: str,
    path: Path,
    threads: int,
    prompt: int,
    new: int,
    repeats: int,
    ids: Sequence[int] | None = None,
) -> dict[str, float]:
    """Load a model and time it.

    Args:
        kind: one of `MODELS`.
        path: of its model.
        threads: for one operator.
        prompt: tokens of a random prompt.
        new: tokens after the first.
        repeats: of prompt and tokens, after one that warms up.
        ids: of the prompt, in place of a random one.
    """
    prompt = len(ids) if ids else prompt
    start = time.perf_counter()
    model = MODELS[kind](path, threads, prompt + new + 1)
    load_s = time.perf_counter() - start
    if not ids:
        ids = np.random.default_rng(0).integers(0, model.vocabulary_size, prompt).tolist()
    prefills, decodes = [], []
    for _ in range(1 + repeats):
        model.begin(np.asarray(ids), new)
        start = time.perf_counter()
        token = model.prefill()
        first = time.perf_counter()
        for _ in range(new):
            token = model.decode(token)
        prefills.append(first - start)
        decodes.append(time.perf_counter() - first)
    return {
        "prefill": prompt / statistics.median(prefills[1:]),
        "decode": new / statistics.median(decodes[1:]),
        "load_s": load_s,
        "peak": _peak_rss_bytes(),
    }


def _peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=list(MODELS))
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ids", type=json.loads, metavar="[ID, …]", help="of the prompt")
    found = measure(**vars(parser.parse_args()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
