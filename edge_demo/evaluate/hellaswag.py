"""Measures accuracy on HellaSwag: which of four endings the model finds most likely.

The data: Zellers et al., 2019, arXiv:1905.07830. The file and the score are as in llama.cpp's
`llama-perplexity --hellaswag` (`tools/perplexity/perplexity.cpp`, `hellaswag_score`), so that
figures can be compared. Six lines a task: `activity: context`, the right ending's number 0 to 3,
four endings. `context + " " + ending` is tokenized as one text after the beginning-of-sequence
token; an ending's score is the mean log-probability of its tokens after those that all four texts
begin with; the greatest wins, the first of equals.

llama.cpp calls this `acc_norm`. lm-evaluation-harness, where the name comes from, divides by the
ending's characters and not by its tokens, so its figures differ. llama.cpp shuffles the tasks, and
here the first ones are taken; over a whole file both are the same.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edge_demo.engine.runner import Engine
from edge_demo.errors import RequestError
from edge_demo.evaluate.perplexity import token_log_probabilities
from edge_demo.text.tokenizer import Tokenizer

_LINES = 6
_Z = 1.959964  # standard deviations on each side that hold 95 % of a normal distribution


@dataclasses.dataclass(frozen=True)
class Task:
    """One beginning with four endings, of which `label` is the right one."""

    context: str
    endings: tuple[str, str, str, str]
    label: int


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Share of tasks that were solved.

    Attributes:
        correct: tasks whose right ending won.
        tasks: how many there were, at least one.
    """

    correct: int
    tasks: int

    @property
    def value(self) -> float:
        """The share, 0 to 1."""
        return self.correct / self.tasks

    @property
    def error(self) -> float:
        """Its standard error, of a binomial share: `sqrt(p (1 - p) / n)`."""
        return math.sqrt(self.value * (1 - self.value) / self.tasks)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, which holds for shares near 0 and 1 too (Wilson, 1927)."""
        p, n, z = self.value, self.tasks, _Z
        middle = p + z * z / (2 * n)
        reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def read_tasks(path: str | Path, text: str) -> list[Task]:
    """The tasks of a file's text.

    Args:
        path: of the file, for messages.
        text: six lines a task; a last line may lack its line break.

    Raises:
        RequestError: the lines are not six a task, a label is not 0 to 3, or there is no task.
    """
    # Only line feeds end a line, as in llama.cpp: a sentence may hold U+2028 or U+0085.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if lines == [""]:
        raise RequestError(f"{path} is empty; it must have {_LINES} lines per task")
    if len(lines) % _LINES:
        raise RequestError(
            f"{path} has {len(lines):,} lines; HellaSwag's text form needs {_LINES} lines "
            "per task: context, label, four endings"
        )
    tasks = []
    for first in range(0, len(lines), _LINES):
        context, label, *endings = lines[first : first + _LINES]
        if not re.fullmatch(r"[0-3]", label.strip(), re.ASCII):
            raise RequestError(
                f"line {first + 2} of {path} must be the number of the correct ending, 0 to "
                f"3; found {label[:40]!r}"
            )
        a, b, c, d = endings
        tasks.append(Task(context, (a, b, c, d), int(label)))
    return tasks


def hellaswag(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    on_task: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Runs the tasks.

    Args:
        engine: emptied and used; the four endings share what it holds of their beginning.
        tokenizer: of the same bundle.
        tasks: at least one.
        on_task: called with (tasks done, all of them).

    Raises:
        RequestError: a task does not fit the context.
        NotFiniteError: as `edge_demo.evaluate.perplexity.token_log_probabilities`.
    """
    engine.rewind(0)
    correct = 0
    for done, task in enumerate(tasks):
        texts = [tokenizer.encode(f"{task.context} {ending}") for ending in task.endings]
        correct += int(np.argmax(ending_scores(engine, texts))) == task.label
        on_task(done + 1, len(tasks))
    return Accuracy(correct, len(tasks))


def ending_scores(engine: Engine, texts: Sequence[Sequence[int]]) -> list[float]:
    """Mean log-probability of each text's tokens after those that all begin with, in nats.

    Args:
        engine: emptied and used.
        texts: token ids, at least one before the first difference; a text that the others only
            continue is scored by its last token.
    """
    common = _common_prefix(texts)
    engine.rewind(0)
    if common > 1:
        engine.prefill(texts[0][: common - 1])
    scores = []
    for ids in texts:
        engine.rewind(common - 1)
        targets = ids[common:]
        # The last shared token is run again with each ending: its logits predict the first token.
        rows = engine.all_logits(ids[common - 1 : -1])
        total, position = 0.0, 0
        for logits in rows:
            total += token_log_probabilities(
                logits, targets[position : position + len(logits)]
            ).sum()
            position += len(logits)
        scores.append(float(total / len(targets)))
    return scores


def _common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts share at their beginning, leaving each at least one more."""
    most = min(len(ids) for ids in texts) - 1
    for index in range(most):
        if len({ids[index] for ids in texts}) > 1:
            return index
    return most
