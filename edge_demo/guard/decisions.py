"""Decides by thresholds whether a text passes, counts the decisions and logs them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Literal

from edge_demo.errors import RequestError, brief
from edge_demo.guard.judge import Judge
from edge_demo.guard.log import DecisionLog
from edge_demo.guard.template import POLICIES, Policy

DEFAULT_THRESHOLD = 0.5
NAMES = tuple(policy.name for policy in POLICIES)

Place = Literal["input", "output"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a guard decided about a text.

    Attributes:
        probabilities: of a violation, by the name of the policy.
        violated: the policies whose probability reached their threshold; none lets the text pass.
    """

    probabilities: Mapping[str, float]
    violated: tuple[Policy, ...]

    @property
    def reasons(self) -> str:
        """The violated policies, for people."""
        return ", ".join(policy.harm.lower() for policy in self.violated)


def policies_of(thresholds: Mapping[str, float]) -> tuple[Policy, ...]:
    """The policies that have a threshold."""
    return tuple(policy for policy in POLICIES if policy.name in thresholds)


def read_thresholds(texts: list[str], names: list[str] | None = None) -> dict[str, float]:
    """Thresholds by the names of policies.

    Args:
        texts: `0.4` for all policies, or `hate=0.4` for one; later ones win.
        names: of the policies that are judged by; `None` for all.

    Raises:
        RequestError: a name or a number is wrong.
    """
    for name in names or ():
        _check_name(name)
    chosen = [name for name in NAMES if names is None or name in names]
    found = dict.fromkeys(chosen, DEFAULT_THRESHOLD)
    for text in texts:
        name, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 < value <= 1:
            raise RequestError(
                f"the threshold {brief(text, 40)!r} must be a number above 0 and at most 1, or "
                "POLICY=NUMBER"
            )
        if equals:
            _check_name(name)
            if name not in found:
                raise RequestError(f"the policy {name!r} has a threshold but is not chosen")
        found.update(dict.fromkeys([name] if equals else chosen, value))
    return found


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise RequestError(
            f"there is no policy {brief(name, 40)!r}; the policies are {', '.join(NAMES)}"
        )


class Guard:
    """Judges texts by the thresholds of policies; one thread at a time may use it.

    Args:
        judge: that gives probabilities for these policies.
        thresholds: by the name of the policy; a probability that reaches it is a violation.
        log: of decisions.

    Attributes:
        decisions: how many there were, by `input` or `output` and `passed` or `refused`.
        refusals: how many there were, by the name of the policy.
        seconds: that judging took.
        judge, log: as they were given.
    """

    def __init__(
        self, judge: Judge, thresholds: Mapping[str, float], log: DecisionLog | None = None
    ) -> None:
        self.judge = judge
        self.log = log
        self._thresholds = dict(thresholds)
        self.decisions = {
            (place, decision): 0
            for place in ("input", "output")
            for decision in ("passed", "refused")
        }
        self.refusals = dict.fromkeys(thresholds, 0)
        self.seconds = 0.0

    def decide(
        self, request: str, prompt: str, response: str | None = None, namespace: str = ""
    ) -> Verdict:
        """Judge a prompt, or a response to it, by all policies.

        Args:
            request: its id, for the log.
            prompt: what a user wrote.
            response: what a model answered so far, where that is judged.
            namespace: as of `Judge.probabilities`.

        Raises:
            TooLongError: they do not fit the guard's context.
            NotFiniteError: the guard's logits are not finite.
        """
        begin = time.perf_counter()
        found = self.judge.probabilities(prompt, response, namespace)
        self.seconds += time.perf_counter() - begin
        violated = tuple(
            p for p in self.judge.policies if found[p.name] >= self._thresholds[p.name]
        )
        place: Place = "input" if response is None else "output"
        self.decisions[place, "refused" if violated else "passed"] += 1
        for policy in violated:
            self.refusals[policy.name] += 1
        verdict = Verdict(found, violated)
        if self.log is not None:
            names = [policy.name for policy in violated]
            self.log.write(request, place, found, names, prompt, response)
        return verdict
