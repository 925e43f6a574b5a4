"""How far our logits are from those of transformers and KerasHub, as a table: every backend, live.

    python -m benchmarks.agreement
    python -m benchmarks.agreement --backends jax --json

Small random models in float32, the cases of `tests/agreement.py`; each project reads the same
folder with its own code. Figures are the greatest difference of any logit (3 texts of 24 tokens,
300 logits each) in units of the logits' standard deviation. KerasHub runs on the backend of the
column, transformers always on PyTorch. A backend has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import agreement
from tests.models import relative_difference

BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--json", action="store_true", help="one JSON line in place of the table")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps({case: figures(case) for case in agreement.CASES}))
        return
    found = {backend: ask(backend) for backend in arguments.backends}
    print(json.dumps(found) if arguments.json else table(found))


def ask(backend: str) -> dict[str, dict[str, float]]:
    """What a process on that backend finds."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.agreement", "--worker"],
        env=os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def figures(case: str) -> dict[str, float]:
    """The distances of one case on the backend of this process."""
    ids = agreement.IDS
    with tempfile.TemporaryDirectory() as name:
        folder = agreement.write_folder(Path(name), agreement.CASES[case])
        ours = agreement.run_here(folder, ids).logits
        model = agreement.read_by_transformers(folder)
        theirs = agreement.run_by_transformers(model, ids).logits
        hub = agreement.run_by_keras_hub(folder, ids).logits
        found = {
            "transformers": relative_difference(ours, theirs),
            "keras_hub": relative_difference(ours, hub),
            "they_from_each_other": relative_difference(hub, theirs),
        }
        if case in agreement.AS_27B:
            plain = agreement.run_by_keras_hub(folder, ids, tell_attention=False).logits
            found["keras_hub_as_it_comes"] = relative_difference(ours, plain)
    return {key: float(value) for key, value in found.items()}


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The figures in Markdown, a generation a row."""
    head = [f"{BACKENDS[b]}, from {who}" for b in found for who in ("transformers", "KerasHub")]
    lines = [["", *head, "they from each other"], ["---"] * (len(head) + 2)]
    plain = []
    for case in agreement.CASES:
        per_backend = [cases[case] for cases in found.values()]
        note = " *" if case in agreement.AS_27B else ""
        cells = []
        for distances in per_backend:
            cells += [f"{distances['transformers']:.1e}", f"{distances['keras_hub']:.1e}{note}"]
        apart = max(distances["they_from_each_other"] for distances in per_backend)
        lines.append([case, *cells, f"{apart:.1e}"])
        if note:
            off = max(distances["keras_hub_as_it_comes"] for distances in per_backend)
            plain.append(f"{off:.2f} ({case})")
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{rows}\n\n\\* KerasHub told of the scale of 27B's queries, which it does not pass on to "
        "attention. As it comes it scales them by head_dim, so its logits are not comparable: off "
        f"by {', '.join(plain)}."
    )


if __name__ == "__main__":
    main()
