"""Compares a bundle with another, usually its float32 reference, on windows of a text.

The figures are those of llama.cpp's `llama-perplexity --kl-divergence`, with the same formulas
(`tools/perplexity/perplexity.cpp`, `kl_divergence`), with two differences. A window is the
beginning-of-sequence token and `length - 1` tokens of the text; llama.cpp writes that token over
one of the text's. And a window's last position counts too, because the text continues. So the
second half of a window of 512 is positions 256 to 511; in llama.cpp it ends at 510.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from edge_demo.bundle.reader import Bundle
from edge_demo.errors import NotFiniteError, RequestError
from edge_demo.evaluate.perplexity import kl_divergence, token_log_probabilities

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
_LEAST_LENGTH = 4  # two positions in the second half: one has no standard error


@dataclasses.dataclass(frozen=True)
class MeanWithError:
    """A figure and its standard error."""

    value: float
    error: float


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The difference between a bundle's and the reference's predictions over some positions.

    Standard errors take positions as independent, as llama.cpp does.

    Attributes:
        positions: how many.
        reference_perplexity: of the reference.
        perplexity: of the bundle.
        log_ratio: `ln(perplexity / reference_perplexity)`; its error takes their correlation into
            account.
        kl: mean Kullback-Leibler divergence of the next-token distributions, from the reference to
            the bundle, in nats.
        kl_quantiles: `(share, KL)` for each of `QUANTILES`; the last is the maximum.
        probability_difference: mean of the right token's probability, bundle less reference.
        rms_probability_difference: root of the mean square of the same.
        same_top_token: share of positions where the most likely token is the same.
    """

    positions: int
    reference_perplexity: MeanWithError
    perplexity: MeanWithError
    log_ratio: MeanWithError
    kl: MeanWithError
    kl_quantiles: tuple[tuple[float, float], ...]
    probability_difference: MeanWithError
    rms_probability_difference: MeanWithError
    same_top_token: MeanWithError


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two bundles compared on a text.

    Attributes:
        windows: how many.
        length: tokens in each, the beginning-of-sequence token included.
        all_positions: over all of them.
        second_halves: over positions `length // 2` to `length - 1` of each window, where every
            token has context.
    """

    windows: int
    length: int
    all_positions: Divergence
    second_halves: Divergence


class LogitsSource(Protocol):
    """The interface of a model that can be compared; `Engine` has it."""

    @property
    def context_length(self) -> int:
        """The maximum number of tokens that it can hold."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...

    def all_logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Add tokens; yields float32 `(chunk, vocabulary_size)`, in chunks as `Engine`'s."""
        ...


def check_comparable(reference: Bundle, bundle: Bundle) -> None:
    """Raise an error for two bundles that cannot be compared.

    Raises:
        RequestError: their tokenizers or their vocabularies differ.
    """
    if reference.vocabulary_size != bundle.vocabulary_size:
        raise RequestError(
            f"{reference.path} and {bundle.path} have vocabularies of "
            f"{reference.vocabulary_size:,} and {bundle.vocabulary_size:,}; compare bundles "
            "of the same model"
        )
    hashes = [b.files[b.tokenizer.file][1] for b in (reference, bundle)]
    if hashes[0] != hashes[1] or reference.tokenizer.bos != bundle.tokenizer.bos:
        raise RequestError(
            f"{reference.path} and {bundle.path} have different tokenizers; compare bundles "
            "of the same model"
        )


def compare(
    reference: LogitsSource,
    engines: Sequence[LogitsSource],
    bos: int,
    ids: Sequence[int],
    length: int = 512,
    max_windows: int | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> list[Comparison]:
    """Run all on the same windows; only one chunk of logits of each is in memory at a time.

    Args:
        reference: emptied and used.
        engines: what is compared with it; emptied and used.
        bos: the beginning-of-sequence token.
        ids: the text's tokens; a rest that fills no window is left out.
        length: tokens in a window, at most either context.
        max_windows: stop after as many.
        on_window: called with (windows done, all of them).

    Returns:
        One for each engine.

    Raises:
        RequestError: the text fills no window, or the length does not fit.
        NotFiniteError: a logit of one of them is NaN or infinity.
    """
    everyone = [reference, *engines]
    context = min(one.context_length for one in everyone)
    if not _LEAST_LENGTH <= length <= context:
        raise RequestError(
            f"a window of {length:,} tokens does not fit; give --length {_LEAST_LENGTH} to "
            f"{context}"
        )
    room = length - 1
    # One more than fill them: the last position's right token is the next of the text.
    num_windows = (len(ids) - 1) // room if ids else 0
    if num_windows < 1:
        raise RequestError(
            f"the text has {len(ids):,} tokens; a window of {length:,} needs {length:,}"
        )
    num_windows = min(num_windows, max_windows or num_windows)
    tables = [_Table(num_windows, length) for _ in engines]
    for number in range(num_windows):
        first = number * room
        window = [bos, *ids[first : first + room]]
        targets = ids[first : first + length]
        for one in everyone:
            one.rewind(0)
        position = 0
        for p, *others in zip(*(one.all_logits(window) for one in everyone), strict=True):
            for table, q in zip(tables, others, strict=True):
                table.put(number, position, p, q, targets[position : position + len(p)])
            position += len(p)
        on_window(number + 1, num_windows)
    return [
        Comparison(
            windows=num_windows,
            length=length,
            all_positions=table.divergence(0),
            second_halves=table.divergence(length // 2),
        )
        for table in tables
    ]


class _Table:
    """Values stored for each position: float64 and bool arrays `(windows, length)`."""

    def __init__(self, num_windows: int, length: int) -> None:
        shape = (num_windows, length)
        self._nll_reference = np.empty(shape)
        self._nll = np.empty(shape)
        self._kl = np.empty(shape)
        self._same = np.empty(shape, bool)

    def put(
        self, window: int, first: int, p: np.ndarray, q: np.ndarray, targets: Sequence[int]
    ) -> None:
        for logits, whose in ((p, "the reference"), (q, "the bundle")):
            if not np.isfinite(logits).all():
                raise NotFiniteError(whose)
        here = window, slice(first, first + len(p))
        self._nll_reference[here] = -token_log_probabilities(p, targets)
        self._nll[here] = -token_log_probabilities(q, targets)
        self._kl[here] = kl_divergence(p, q)
        self._same[here] = p.argmax(axis=-1) == q.argmax(axis=-1)

    def divergence(self, first: int) -> Divergence:
        """Over the positions from `first` on in each window."""
        tables = (self._nll_reference, self._nll, self._kl, self._same)
        return summarize(*(table[:, first:].ravel() for table in tables))


def summarize(
    nll_reference: np.ndarray, nll: np.ndarray, kl: np.ndarray, same: np.ndarray
) -> Divergence:
    """The figures of some positions.

    Args:
        nll_reference: negative log-likelihood of the right token by the reference, in nats, float64
            `(positions,)`, at least two.
        nll: the same by the bundle.
        kl: divergence of the two distributions, in nats.
        same: whether the most likely token is the same.
    """
    difference = np.exp(-nll) - np.exp(-nll_reference)
    square = _mean(difference**2)
    rms = square.value**0.5
    return Divergence(
        positions=len(kl),
        reference_perplexity=_exponential(_mean(nll_reference)),
        perplexity=_exponential(_mean(nll)),
        # Of the differences, position by position: var(a - b) = var(a) + var(b) - 2 cov(a, b).
        log_ratio=_mean(nll - nll_reference),
        kl=_mean(kl),
        kl_quantiles=tuple(
            (q, float(v)) for q, v in zip(QUANTILES, np.quantile(kl, QUANTILES), strict=True)
        ),
        probability_difference=_mean(difference),
        rms_probability_difference=MeanWithError(rms, 0.5 * square.error / rms if rms else 0.0),
        same_top_token=_mean(same.astype(np.float64)),
    )


def _mean(values: np.ndarray) -> MeanWithError:
    """Mean and its standard error, `sqrt((E[x²] - E[x]²) / (n - 1))`."""
    return MeanWithError(float(values.mean()), float(values.std() / (len(values) - 1) ** 0.5))


def _exponential(estimate: MeanWithError) -> MeanWithError:
    """Applies a function to an estimate; the error is propagated to first order."""
    with np.errstate(over="ignore"):
        value = float(np.exp(estimate.value))
    return MeanWithError(value, value * estimate.error)


def as_table(comparison: Comparison) -> str:
    """The comparison for people: a column over all positions, one over second halves."""
    columns = (comparison.all_positions, comparison.second_halves)

    def row(label: str, cells: Sequence[str]) -> str:
        return f"{label:<24}" + "".join(f"{cell:>26}" for cell in cells)

    def pair(estimate: MeanWithError, digits: int, unit: str = "") -> str:
        scale = 100 if unit else 1
        value, error = scale * estimate.value, scale * estimate.error
        return f"{value:.{digits}f} ± {error:.{digits}f}{unit}"

    lines = [
        row("", ("all positions", "second halves")),
        row("positions", [f"{c.positions:,}" for c in columns]),
        row("perplexity", [pair(c.perplexity, 4) for c in columns]),
        row("  of the reference", [pair(c.reference_perplexity, 4) for c in columns]),
        row("  ln of their ratio", [pair(c.log_ratio, 6) for c in columns]),
        row("KL, mean (nats)", [pair(c.kl, 6) for c in columns]),
    ]
    for index, share in enumerate(QUANTILES):
        label = {0.5: "median", 1.0: "greatest"}.get(share, f"{100 * share:g} %")
        lines.append(row(f"  {label}", [f"{c.kl_quantiles[index][1]:.6f}" for c in columns]))
    lines += [
        row("right token's Δp, mean", [pair(c.probability_difference, 3, " %") for c in columns]),
        row("  RMS", [pair(c.rms_probability_difference, 3, " %") for c in columns]),
        row("same top token", [pair(c.same_top_token, 3, " %") for c in columns]),
    ]
    return "\n".join(lines)
