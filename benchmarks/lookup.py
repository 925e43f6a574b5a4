"""What prompt lookup gains: greedy answers to three fixed prompts, plain and with `--lookup`.

    python benchmarks/lookup.py build/sample-int4 --text WIKITEXT

Summarizing 1,600 characters of the text, editing two functions of code, and free text. The two take
turns; prints medians of the decode speeds, their ratio, and how many of the 128 tokens are the same
from the first on: several rows round otherwise than one, so near-ties part.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from edge_demo.bundle import Bundle
from edge_demo.engine import CandidateEngine, common_prefix
from edge_demo.generator import Generator
from edge_demo.sampling import Sampler
from edge_demo.speculate import PromptLookup
from edge_demo.tokenizer import Tokenizer

_TOKENS = 128
_CODE = """def load(path):
    with open(path) as file:
        rows = [line.split(",") for line in file]
    result = {}
    for row in rows:
        result[row[0]] = float(row[1])
    return result

def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)

# The same two functions, with docstrings:

def load(path):
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="What prompt lookup gains.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    bundle = Bundle.open(arguments.bundle)
    generator = Generator(CandidateEngine(bundle, arguments.threads), Tokenizer(bundle))
    article = arguments.text.read_text(encoding="utf-8")[300:1900]
    prompts = {
        "summary": f"{article}\n\nSummary of the article above, in its own words:\n",
        "code": _CODE,
        "free text": "Once upon a time, in a small house by the sea,",
    }
    print("| | prompt, tokens | plain, tokens/s | lookup, tokens/s | ratio | same tokens |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for name, prompt in prompts.items():
        ids = generator.tokenizer.encode(prompt)
        speeds: dict[bool, list[float]] = {False: [], True: []}
        answers: dict[bool, list[int]] = {}
        for number in range(arguments.rounds + 1):
            for lookup in (False, True):
                generator.engine.rewind(0)
                drafter = PromptLookup() if lookup else None
                found = generator.generate(ids, Sampler(), _TOKENS, drafter)
                answers[lookup] = found.ids
                if number:  # the first one warms up
                    speeds[lookup].append(found.decode_tokens_per_s or 0)
        plain, guessed = (statistics.median(speeds[lookup]) for lookup in (False, True))
        ratios.append(guessed / plain)
        same = common_prefix(answers[False], answers[True])
        print(
            f"| {name} | {len(ids)} | {plain:.1f} | {guessed:.1f} | {ratios[-1]:.2f} "
            f"| {same} of {len(answers[False])} |",
            flush=True,
        )
    print(f"| mean | | | | {statistics.mean(ratios):.2f} | |")


if __name__ == "__main__":
    main()
