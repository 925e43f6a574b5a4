"""The settings of an answer that all routes have: sampling, length, stop texts, logits."""

from __future__ import annotations

import dataclasses
from typing import Any

from edge_demo.errors import RequestError
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.fields import Fields
from edge_demo.text.grammar import GrammarSource
from edge_demo.text.logit_bias import LogitBias
from edge_demo.text.ranges import RANGES
from edge_demo.text.sampling import Sampler
from edge_demo.text.stop_texts import check_stop_texts

MOST_STOPS = 4
MOST_CHOICES = 4
MOST_TOP = 20
_MOST_TOKENS = 10**6
_MOST_SEED = 2**63 - 1
_MOST_BIASES = 300
_LONGEST_STOP = 200  # characters

# What Gemma's authors recommend; the others ask for nothing.
_DEFAULTS = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
# Hints and notes of clients that change nothing about the text.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "verbosity"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "moderation"),
    *("reasoning_effort", "prediction", "cache_prompt", "id_slot", "timings_per_token"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers to a prompt are chosen.

    Attributes:
        sampling: arguments of `Sampler`, but its seed.
        seed: of the first choice, the next of which have the next numbers; `None` for any.
        max_tokens: of an answer; `None` until the context is full.
        stop: texts that end it.
        choices: how many answers there are to be.
        bias: of logits.
        top: number of likely alternatives given for each token; `None` for no log-probabilities.
        grammar: that the answers keep to.
    """

    sampling: dict[str, Any]
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    choices: int = 1
    bias: LogitBias | None = None
    top: int | None = None
    grammar: GrammarSource | None = None

    def sampler(self, choice: int = 0) -> Sampler:
        """Of one choice."""
        seed = None if self.seed is None else self.seed + choice
        return Sampler(**self.sampling, seed=seed)


def read_settings(
    fields: Fields,
    length_names: tuple[str, ...],
    top: int | None,
    vocabulary_size: int,
    grammar: GrammarSource | None = None,
) -> Settings:
    """The settings in a request.

    Args:
        fields: of the request.
        length_names: of the fields that limit an answer; the smallest counts.
        top: as in `Settings`.
        vocabulary_size: which the ids of `logit_bias` are below.
        grammar: as in `Settings`.

    Raises:
        Refusal: one is out of range.
    """
    sampling = {
        name: _setting(fields, name, default)
        for name, default in (
            *_DEFAULTS.items(),
            *(("min_p", 0.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)),
            *(("repeat_penalty", 1.0), ("repeat_last_n", 64)),
        )
    }
    if "repetition_penalty" in fields and "repeat_penalty" not in fields:  # vLLM's name
        sampling["repeat_penalty"] = _setting(fields, "repetition_penalty", 1.0)
    lengths = [fields.whole(name, 1, _MOST_TOKENS) for name in length_names]
    given = [length for length in lengths if length is not None]
    choices = fields.whole("n", 1, MOST_CHOICES) or 1
    return Settings(
        sampling=sampling,
        seed=_seed(fields),
        max_tokens=min(given, default=None),
        stop=_stop(fields),
        choices=choices,
        bias=_bias(fields, vocabulary_size),
        top=top,
        grammar=grammar,
    )


def _setting(fields: Fields, name: str, default: float) -> float:
    if name in ("top_k", "repeat_last_n"):
        least = -1 if name == "repeat_last_n" else 0
        whole = fields.whole(name, least, _MOST_TOKENS)
        return default if whole is None else whole
    least, most, inclusive = RANGES["repeat_penalty" if name.startswith("repet") else name]
    found = fields.number(name, least, most)
    if found is not None and found == least and not inclusive:
        raise fields.wrong(name, f"above {least:g}")
    return default if found is None else found


def _seed(fields: Fields) -> int | None:
    seed = fields.whole("seed", -_MOST_SEED - 1, _MOST_SEED)
    return None if seed is None else seed & (2**64 - 1)  # numpy takes none below 0


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.any("stop")
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or any(not isinstance(text, str) for text in texts):
        raise fields.wrong("stop", "text, or a list of texts")
    if len(texts) > MOST_STOPS:
        raise Refusal(f"stop has {len(texts):,} texts; the limit is {MOST_STOPS}", param="stop")
    if any(len(text) > _LONGEST_STOP for text in texts):
        raise Refusal(f"a text of stop has over {_LONGEST_STOP} characters", param="stop")
    try:
        return check_stop_texts(texts)
    except RequestError as error:
        raise Refusal(str(error), param="stop") from None


def _bias(fields: Fields, vocabulary_size: int) -> LogitBias | None:
    inner = fields.any("logit_bias")
    if not inner:
        return None
    if not isinstance(inner, dict) or len(inner) > _MOST_BIASES:
        raise Refusal(
            f"logit_bias must be an object of at most {_MOST_BIASES} token ids", param="logit_bias"
        )
    biases = Fields(inner, "logit_bias")
    found = {}
    for name in inner:
        if not name.isascii() or not name.isdecimal() or int(name[:12]) >= vocabulary_size:
            raise Refusal(
                f"logit_bias has {name[:40]!r}, which is not a token id below {vocabulary_size:,}",
                param="logit_bias",
            )
        found[int(name)] = biases.number(name, -100, 100) or 0.0
    return LogitBias(found)
