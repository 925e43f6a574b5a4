"""llama.cpp on a GGUF file, where llama-cpp-python is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

# Looked for only: importing it leaves a file open.
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed; the extra `benchmarks` has it",
)

# In a process of its own, which may crash: the AMX kernels of llama-cpp-python 0.3.36 do, on files
# that llama.cpp itself made Q8_0 as well, so nothing is repacked for them.
LLAMA = """
import json, sys
import numpy as np
import llama_cpp

path, ids, forced, count, texts, lora = json.loads(sys.stdin.read())
defaults = llama_cpp.llama_cpp.llama_model_default_params
def without_repacking():
    parameters = defaults()
    parameters.use_extra_bufts = False
    return parameters
llama_cpp.llama_cpp.llama_model_default_params = without_repacking
model = llama_cpp.Llama(
    path, n_ctx=256, n_threads=2, type_k=0, type_v=0, logits_all=True, verbose=False,
    vocab_only=not ids, lora_path=lora,
)
encoded = [model.tokenize(text.encode(), special=False) for text in texts]
answer, logits, best = [], [], []
if ids:
    model.eval(ids + forced)
    rows = model.scores[: len(ids + forced)]
    logits = [[float(x) for x in row[:300]] for row in rows]
    best = [int(row.argmax()) for row in rows]
    model.reset()
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
        if len(answer) == count:
            break
        answer.append(int(token))
print(json.dumps({"answer": answer, "logits": logits, "best": best, "encoded": encoded}))
"""


def llama(path, ids=(), forced=(), count=0, texts=(), lora=None):
    """What llama.cpp makes of a file, with the adapter in the file `lora` if there is one.

    `answer` are the tokens it adds to `ids`; `logits` its first 300 at every position of `ids` and
    `forced`, `best` the greatest of all there; `encoded` the ids of `texts`.
    """
    done = subprocess.run(
        [sys.executable, "-c", LLAMA],
        input=json.dumps(
            [str(path), list(ids), list(forced), count, list(texts), lora and str(lora)]
        ),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
