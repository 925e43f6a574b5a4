"""What prompt lookup gains: greedy answers to three fixed prompts, plain and with `--lookup`.

    python benchmarks/lookup.py build/sample-int4 --text WIKITEXT \\
        --genai build/pareto/genai-int4-pruned

Summarizing 1,600 characters of the text, editing two functions of code, and free text. All take
turns; prints medians of the decode speeds, their ratio, and how many of the 128 tokens are the
same from the first on: several rows round otherwise than one, so near-ties part. With `--genai`, a
folder that `edge.py` makes, onnxruntime-genai answers the prompts too, from its own weights, alone
in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from peers import alone

from edge_demo.bundle.reader import Bundle
from edge_demo.device import huge_pages
from edge_demo.engine.runner import CandidateEngine, common_prefix
from edge_demo.text.generator import Generator
from edge_demo.text.sampling import Sampler
from edge_demo.text.speculate import PromptLookup
from edge_demo.text.tokenizer import Tokenizer

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
    parser.add_argument("--genai", type=Path, help="onnxruntime-genai's export, to be beaten")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    if huge_pages.of_use():
        huge_pages.restart_with_huge_pages()
    bundle = Bundle.open(arguments.bundle)
    generator = Generator(CandidateEngine(bundle, arguments.threads), Tokenizer(bundle))
    article = arguments.text.read_text(encoding="utf-8")[300:1900]
    prompts = {
        "summary": f"{article}\n\nSummary of the article above, in its own words:\n",
        "code": _CODE,
        "free text": "Once upon a time, in a small house by the sea,",
    }
    heads = ["", "prompt, tokens", "plain, tokens/s", "lookup, tokens/s", "ratio", "same tokens"]
    heads += ["onnxruntime-genai, tokens/s", "lookup to it"] if arguments.genai else []
    print("| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", sep="\n")
    ratios, leads = [], []
    for name, prompt in prompts.items():
        ids = generator.tokenizer.encode(prompt)
        speeds: dict[bool, list[float]] = {False: [], True: []}
        peer_speeds: list[float] = []
        answers: dict[bool, list[int]] = {}
        for number in range(arguments.rounds + 1):
            for lookup in (False, True):
                generator.engine.rewind(0)
                drafter = PromptLookup() if lookup else None
                found = generator.generate(ids, Sampler(), _TOKENS, drafter)
                answers[lookup] = found.ids
                if number:  # the first one warms up
                    speeds[lookup].append(found.decode_tokens_per_s or 0)
            if arguments.genai and number:
                options = {"threads": arguments.threads, "repeats": 1, "ids": ids}
                found = alone("onnxruntime-genai", arguments.genai, new=_TOKENS - 1, **options)
                peer_speeds.append(found["decode"])
        plain, guessed = (statistics.median(speeds[lookup]) for lookup in (False, True))
        ratios.append(guessed / plain)
        same = common_prefix(answers[False], answers[True])
        cells = [name, f"{len(ids)}", f"{plain:.1f}", f"{guessed:.1f}", f"{ratios[-1]:.2f}"]
        cells.append(f"{same} of {len(answers[False])}")
        if peer_speeds:
            theirs = statistics.median(peer_speeds)
            leads.append(guessed / theirs)
            cells += [f"{theirs:.1f}", f"{leads[-1]:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    means = ["mean", "", "", "", f"{statistics.mean(ratios):.2f}", ""]
    means += ["", f"{statistics.mean(leads):.2f}"] if leads else []
    print("| " + " | ".join(means) + " |")


if __name__ == "__main__":
    main()
