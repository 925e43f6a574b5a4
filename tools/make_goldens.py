"""Writes the goldens of `tests/goldens` anew: `KERAS_BACKEND=jax python -m tools.make_goldens`.

Each holds a configuration, a seed of weights, token ids, and some of the hidden states and logits
that transformers and KerasHub compute from them, each reading the same folder with its own code.
Nothing of this project's mathematics is asked. Made anew when a pinned package changes; what the
change moved is in the diff.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import keras

from tests import agreement
from tests.models import relative_difference

_PACKAGES = ("numpy", "transformers", "torch", "keras-hub", "keras")
_ABOUT = (
    "A small random Gemma in float32 as other projects compute it; written by "
    "tools/make_goldens.py. The weights follow from the seed: tests/agreement.py, seeded_weight. "
    "Values are at `positions` of each row of `token_ids`, for `vocabulary_ids` and `hidden_dims`; "
    "spreads are standard deviations of all values."
)
_TOLD = (
    "KerasHub's attention has been told query_head_dim_normalize=False, which its decoder blocks "
    "keep to themselves: as it comes, KerasHub scales the queries of the 27B sizes by "
    "head_dim ** -0.5, not by (hidden_dim // heads) ** -0.5 as they were trained, so its logits "
    "are not comparable: they differ from transformers' by `as_it_comes`, in units of the spread."
)


def main() -> None:
    agreement.GOLDENS.mkdir(exist_ok=True)
    for case in agreement.CASES:
        path = agreement.golden_path(case)
        path.write_text(as_text(golden(case)), encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size} bytes", flush=True)


def golden(case: str) -> dict[str, Any]:
    """What the file of a case holds."""
    config = agreement.CASES[case]
    with tempfile.TemporaryDirectory() as name:
        folder = agreement.write_folder(Path(name), config)
        model = agreement.read_by_transformers(folder)
        # Of the weights as transformers holds them: names and shapes are its own.
        weights = [(n, p.detach().numpy()) for n, p in model.named_parameters()]
        theirs = agreement.run_by_transformers(model, agreement.IDS)
        hub = agreement.run_by_keras_hub(folder, agreement.IDS)
        told = {}
        if case in agreement.AS_27B:
            plain = agreement.run_by_keras_hub(folder, agreement.IDS, tell_attention=False)
            difference = relative_difference(plain.logits, theirs.logits)
            told = {"told": _TOLD, "as_it_comes": float(f"{difference:.3g}")}
    return {
        "about": _ABOUT,
        "made_with": {package: importlib.metadata.version(package) for package in _PACKAGES}
        | {"keras_backend": keras.config.backend()},
        "config": config,
        "seed": agreement.SEED,
        "weights_sha256": agreement.digest(weights),
        "token_ids": agreement.IDS.tolist(),
        "positions": agreement.POSITIONS,
        "vocabulary_ids": agreement.VOCABULARY_IDS,
        "hidden_dims": agreement.HIDDEN_DIMS,
        "transformers": agreement.golden_values(theirs),
        "keras_hub": told | agreement.golden_values(hub),
    }


def as_text(data: dict[str, Any]) -> str:
    """JSON with each innermost list on a line of its own."""
    text = json.dumps(data, indent=1)
    rows = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    return rows + "\n"


if __name__ == "__main__":
    main()
