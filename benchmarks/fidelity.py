"""How faithful a bundle is: against another bundle (usually fp32) on windows of a text.

    python benchmarks/fidelity.py build/sample-fp32 build/sample-int8 --text FILE --windows 8

Prints one JSON line. `kl` is from the reference's next-token distribution to the bundle's, in nats,
`same_top_token` the share of positions with the same most likely token: over all positions and over
the second half of each window, where every token has context.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from edge_demo.bundle import Bundle
from edge_demo.engine import Engine
from edge_demo.score import log_softmax, token_log_probabilities
from edge_demo.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", help="bundle to compare with")
    parser.add_argument("bundle", help="bundle to judge")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()

    engines = [Engine(Bundle.open(path)) for path in (arguments.reference, arguments.bundle)]
    tokenizer = Tokenizer(engines[0].bundle)
    room = arguments.length - 1  # each window begins with the beginning-of-sequence token
    text = tokenizer.encode(arguments.text.read_text(encoding="utf-8"), bos=False)
    windows = [text[i * room : (i + 1) * room] for i in range(arguments.windows)]
    if len(windows[-1]) < room:
        sys.exit(f"the text has only {len(text)} tokens")

    kl, same, nll = [], [], []
    for number, window in enumerate(windows):
        for engine in engines:
            engine.rewind(0)
        ids = [tokenizer.spec.bos, *window]
        rows = zip(*(engine.all_logits(ids) for engine in engines), strict=True)
        position = 0
        for p, q in rows:
            log_p, log_q = log_softmax(p), log_softmax(q)
            kl.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
            same.append(p.argmax(axis=-1) == q.argmax(axis=-1))
            targets = ids[position + 1 : position + 1 + len(p)]
            nll.append([-token_log_probabilities(x[: len(targets)], targets) for x in (p, q)])
            position += len(p)
        print(f"window {number + 1} of {len(windows)}", file=sys.stderr)

    shape = (len(windows), arguments.length)
    kl, same = np.concatenate(kl).reshape(shape), np.concatenate(same).reshape(shape)
    half = arguments.length // 2
    perplexity = np.exp(np.concatenate([np.stack(x) for x in nll], axis=1).mean(axis=1))
    print(
        json.dumps(
            {
                "reference": engines[0].bundle.recipe,
                "bundle": engines[1].bundle.recipe,
                "windows": len(windows),
                "length": arguments.length,
                "mean_kl": kl.mean(),
                "mean_kl_second_half": kl[:, half:].mean(),
                "kl_99": np.quantile(kl, 0.99),
                "max_kl": kl.max(),
                "same_top_token": same.mean(),
                "same_top_token_second_half": same[:, half:].mean(),
                "perplexity_reference": perplexity[0],
                "perplexity": perplexity[1],
            }
        )
    )


if __name__ == "__main__":
    main()
