"""Answers in a promised form: JSON, a JSON schema, a regular expression or a Lark grammar.

llguidance says which tokens may come next. It needs a table of all tokens, which takes a
second or more. It is made once: at the first grammar, or before by `Grammars.prepare`.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from edge_demo.engine.candidates import Candidates
from edge_demo.errors import EdgeError, RequestError, brief
from edge_demo.text.json_numbers import NumberWatch
from edge_demo.text.tokenizer import Tokenizer

LONGEST = 1 << 16  # characters of a schema or grammar
Kind = Literal["json_schema", "regex", "lark"]

# As `json.dumps` writes. Free white space invites small models to write nothing else.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Tokens that JSON's strings may hold are told apart at once where this much more may come. Without
# these tables, 17 MB each, a mask within a string takes a quarter of a token's time.
_SLICES = [rf'[^"\\\x00-\x1F\x7F]{{1,{most}}}' for most in (10, 30)]
# A tenth of llguidance's own limits: a board has a tenth of a server's speed.
_LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class NoCandidateError(EdgeError):
    """None of the likeliest tokens is allowed; the logits of all tokens are needed."""


@dataclasses.dataclass(frozen=True)
class GrammarSource:
    """The form that an answer is to have.

    Attributes:
        kind: of the text.
        text: JSON of a schema, a regular expression, or a grammar.
        json: whether a grammar's answers can be JSON.
    """

    kind: Kind
    text: str
    json: bool = False

    @property
    def is_json(self) -> bool:
        """Whether it can be JSON, whose numbers are kept short."""
        return self.json or self.kind == "json_schema"


class Grammar:
    """Which tokens may come next in one answer.

    Args:
        matcher: llguidance's, at its beginning.
        words: of 32 bits in a mask of all tokens.
        tokenizer: of the bundle.
        numbers: watches the lengths of numbers; `None` lets them be as long as the grammar does.
    """

    def __init__(
        self, matcher: Any, words: int, tokenizer: Tokenizer, numbers: NumberWatch | None
    ) -> None:
        self._matcher = matcher
        self._mask = np.zeros(words, np.int32)
        self._tokenizer = tokenizer
        self._numbers = numbers

    @property
    def ended(self) -> bool:
        """Whether the answer is whole, and nothing may follow."""
        return self._matcher.is_stopped()

    def filter(self, logits: np.ndarray | Candidates) -> np.ndarray | Candidates:
        """The logits of tokens that may come next.

        Args:
            logits: float32 `(n,)` of the ids 0 to n - 1, or candidates.

        Returns:
            The same, with -infinity for other tokens, or the candidates that are allowed.

        Raises:
            NoCandidateError: none of the candidates is.
            EdgeError: the grammar takes too long at this place.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        self._forbid_digits()
        if isinstance(logits, np.ndarray):
            bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: logits.size]
            return np.where(bits, logits, np.float32(-np.inf))
        ids = logits.ids
        allowed = (self._mask[ids >> 5] >> (ids & 31)) & 1 == 1
        if not allowed.any():
            raise NoCandidateError("none of the likeliest tokens is allowed")
        return Candidates(ids[allowed], logits.logits[allowed])

    def take(self, token: int) -> None:
        """Go on after a token that was chosen.

        Raises:
            EdgeError: it is not allowed, or the grammar takes too long.
        """
        self._matcher.consume_token(token)
        self._check()
        if self._numbers is not None:
            self._numbers.take(self._tokenizer.piece_bytes(token))

    def forced(self) -> list[int]:
        """The tokens that must come next, if there is no choice; they are not taken yet."""
        return self._matcher.compute_ff_tokens()

    def _forbid_digits(self) -> None:
        """Let a long number end, unless a digit must come."""
        if self._numbers is None or (ids := self._numbers.forbidden) is None:
            return
        before = self._mask.copy()
        np.bitwise_and.at(self._mask, ids >> 5, ~(np.int32(1) << (ids & 31)))
        if not self._mask.any():
            self._mask[:] = before

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EdgeError(f"the grammar failed: {brief(self._matcher.get_error())}")


class Grammars:
    """Makes grammars for one tokenizer; any thread may ask.

    Args:
        tokenizer: of the bundle.
        vocabulary_size: rows of the model's table.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int) -> None:
        self._tokenizer = tokenizer
        self._size = vocabulary_size
        self._lock = threading.Lock()
        self._made: Any = None
        self._digits = np.zeros(0, np.int32)

    def prepare(self) -> None:
        """Make the table of tokens, if it is not there.

        Raises:
            ModuleNotFoundError: llguidance is not installed.
        """
        import llguidance

        with self._lock:
            if self._made is None:
                pieces = _Pieces(self._tokenizer)
                self._digits = np.array(
                    [i for i, piece in enumerate(pieces.tokens) if piece[:1].isdigit()], np.int32
                )
                self._made = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(pieces),
                    n_vocab=self._size,
                    eos_token=list(self._tokenizer.spec.stop),
                    slices=_SLICES,
                )

    def compile(self, source: GrammarSource) -> Grammar:
        """A grammar at its beginning.

        Raises:
            RequestError: the source is not valid, too large, or needs what llguidance lacks.
            ModuleNotFoundError: llguidance is not installed.
        """
        if len(source.text) > LONGEST:
            raise RequestError(
                f"the {source.kind} has {len(source.text):,} characters; the limit is {LONGEST:,}"
            )
        self.prepare()
        import llguidance

        matcher_of = llguidance.LLMatcher
        try:
            if source.kind == "json_schema":
                text = matcher_of.grammar_from_json_schema(source.text, overrides=_JSON)
            elif source.kind == "regex":
                text = matcher_of.grammar_from_regex(source.text)
            else:
                text = matcher_of.grammar_from_lark(source.text)
        except ValueError as error:
            raise RequestError(f"the {source.kind} is not valid: {brief(error)}") from None
        limits = llguidance.LLParserLimits(**_LIMITS)
        matcher = matcher_of(self._made, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(f"the {source.kind} is not valid: {brief(matcher.get_error())}")
        numbers = NumberWatch(self._digits) if source.is_json else None
        return Grammar(matcher, (self._made.vocab_size + 31) // 32, self._tokenizer, numbers)


class _Pieces:
    """The tokens as llguidance reads them: bytes, control tokens marked by a byte of no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bos_token_id = tokenizer.spec.bos
        self.eos_token_id = tokenizer.spec.stop[0]
        self.tokens = [
            tokenizer.piece_bytes(token) or b"\xff<%d>" % token
            for token in range(tokenizer.num_pieces)
        ]
        self.special_token_ids: Sequence[int] = [
            token for token, piece in enumerate(self.tokens) if piece[:2] == b"\xff<"
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, bos=False)
