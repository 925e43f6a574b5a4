"""What a processor makes of a bundle: the same program here and on the emulated device.

`python -m tools.arm64.observe BUNDLE FOLDER --max-tokens N --positions N --threads N` writes
`observation.json` and `logits.npy` to the folder. It uses what a device has installed and no more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Any

import edge_demo  # noqa: F401 - before onnxruntime, whose telemetry it turns off

# isort: split
import numpy as np
import onnxruntime

from edge_demo.bundle.reader import Bundle
from edge_demo.device.memory_limits import peak_rss_bytes
from edge_demo.engine.runner import Engine
from edge_demo.text.generator import Completion, Generator, engine_for
from edge_demo.text.sampling import Sampler
from edge_demo.text.tokenizer import Tokenizer

PROMPTS = (
    "The three primary colors are",
    "Once upon a time, in a small house by the sea,",
    "Water boils at a temperature of",
)
TEXT = (
    "The harbour was quiet that morning. A few boats had come in before the tide turned, and the "
    "men who had spent the night on the water were asleep in the small houses along the quay. On "
    "the wall above the market someone had painted a list of prices, which nobody had changed "
    "since the winter: herring at three for a coin, crab by weight, and oysters only when the "
    "river was clear. The first cart arrived a little after six. Its driver, a woman of about "
    "forty, tied the horse to a ring, looked at the sky, and began to unload baskets of bread. "
    "By seven the quay was loud with wheels, and the baker's boy ran from door to door."
)


@dataclasses.dataclass(frozen=True)
class Observation:
    """What one processor made of one bundle.

    Attributes:
        machine: its architecture, as Python names it.
        onnxruntime: its version.
        answers: tokens of the greedy answer to each of `PROMPTS`.
        margins: how far the greatest logit was above the second, for each of these tokens, and for
            the stop token where one ended the answer.
        texts: the answers as text.
        generate_bytes: the most memory the process had when it had answered, in bytes.
        modules: top-level modules that were imported by then.
        logits: after each of the first positions of `TEXT`, float32 `(positions, vocabulary_size)`.
    """

    machine: str
    onnxruntime: str
    answers: list[list[int]]
    margins: list[list[float]]
    texts: list[str]
    generate_bytes: int
    modules: list[str]
    logits: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> Observation:
        """What `main` wrote; the logits stay in the file until they are used."""
        fields = json.loads((folder / "observation.json").read_text())
        return cls(**fields, logits=np.load(folder / "logits.npy", mmap_mode="r"))


@dataclasses.dataclass
class WatchedSampler(Sampler):
    """Greedy, and keeps how sure each choice was.

    Attributes:
        margins: the greatest logit less the second, for each choice.
    """

    margins: list[float] = dataclasses.field(default_factory=list)

    def _choose(self, logits: np.ndarray) -> int:
        """As `Sampler`; of candidates these are theirs."""
        second, best = np.partition(logits, -2)[-2:]
        self.margins.append(float(best - second))
        return super()._choose(logits)


def observe(bundle: Bundle, max_tokens: int, positions: int, threads: int) -> dict[str, Any]:
    """Answer `PROMPTS` greedily, then run the beginning of `TEXT`.

    Args:
        bundle: opened.
        max_tokens: of each answer.
        positions: of the text, the beginning-of-sequence token among them.
        threads: for an operator.

    Returns:
        The fields of an `Observation`.
    """
    tokenizer = Tokenizer(bundle)
    answers: list[Completion] = []
    margins: list[list[float]] = []
    generator = Generator(engine_for(bundle, Sampler(), threads), tokenizer)
    for prompt in PROMPTS:
        sampler = WatchedSampler()
        answers.append(generator.generate(tokenizer.encode(prompt), sampler, max_tokens))
        margins.append(sampler.margins)
    del generator
    generate_bytes = peak_rss_bytes()
    modules = sorted({name.split(".")[0] for name in sys.modules})
    ids = tokenizer.encode(TEXT)[:positions]
    logits = np.concatenate(list(Engine(bundle, threads).all_logits(ids)))
    return {
        "machine": platform.machine(),
        "onnxruntime": onnxruntime.__version__,
        "answers": [answer.ids for answer in answers],
        "margins": margins,
        "texts": [answer.text for answer in answers],
        "generate_bytes": generate_bytes,
        "modules": modules,
        "logits": logits,
    }


def main() -> None:
    """Observe a bundle and write what was seen."""
    parser = argparse.ArgumentParser(description="What this processor makes of a bundle.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--positions", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    fields = observe(
        Bundle.open(arguments.bundle), arguments.max_tokens, arguments.positions, arguments.threads
    )
    arguments.folder.mkdir()
    np.save(arguments.folder / "logits.npy", fields.pop("logits"))
    (arguments.folder / "observation.json").write_text(json.dumps(fields))


if __name__ == "__main__":
    main()
