"""The engine: onnxruntime's sessions over key-value buffers. It knows token ids and no text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from edge_demo.bundle.embedding import EmbeddingTable
from edge_demo.bundle.manifest import GraphSpec, TensorSpec
from edge_demo.bundle.reader import Bundle
from edge_demo.engine import float_prompts, memory, prompt_chunks, sessions
from edge_demo.engine.binding import Binding, present_name
from edge_demo.engine.candidates import Candidates
from edge_demo.engine.kv_cache import KVCache, Snapshot
from edge_demo.engine.low_plane import LowPlane
from edge_demo.engine.prompt_chunks import PromptRun
from edge_demo.errors import BundleError, RequestError

OnProgress = Callable[[int, int], None]

_SCORE_CHUNK = 64  # 67 MB of logits for a vocabulary of 262 144


class TokenRunner:
    """Feeds tokens to one graph of a bundle, whichever its outputs are.

    A token's keys and values are written in place, so a step allocates and copies nothing but its
    own activations. Long prompts may be run in float32: see `edge_demo.engine.float_prompts`.

    Args:
        bundle: opened; its files are checked against their hashes here.
        graph: of the bundle, the one to run.
        outputs: what it returns beside the keys and values, which are updated in place.
        threads: for one operator; `None` lets onnxruntime take the physical cores.
        texts: whose keys and values memory must hold at once, this one's and those of
            `BatchDecoder`.
        force: whether to run what seems not to fit into memory.

    Attributes:
        tokens: the ids whose keys and values are in the buffers.

    Raises:
        BundleError: a file has changed, or the graph does not keep its contract.
        EdgeError: there is not enough memory; see `edge_demo.engine.memory`.
        RequestError: `threads` is out of range, or the bundle embeds texts.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: GraphSpec,
        outputs: Sequence[TensorSpec],
        threads: int | None = None,
        texts: int = 1,
        force: bool = False,
    ) -> None:
        bundle.require_generator()
        sessions.check_threads(threads)
        bundle.verify()
        self._prefill_chunk, in_float = memory.check_fits(bundle, graph, texts, force)
        self.bundle = bundle
        self.graph = graph
        self.tokens: list[int] = []
        self._embedding = EmbeddingTable(bundle.path / bundle.weights, bundle.embedding)
        self._session = sessions.open_session(bundle, graph, outputs, threads)
        self._check_contract(self._session, graph)
        self._prompts: sessions.Session | None = None  # for long ones
        if in_float:
            self._prompts = sessions.open_for_prompts(bundle, threads)
            self._check_contract(self._prompts, bundle.engine)
        self._cache = KVCache(graph, bundle.ropes, bundle.windows, bundle.context_length)
        self._prompt_run = PromptRun()
        self._bindings: dict[int, Binding] = {}

    def _check_contract(self, session: sessions.Session, graph: GraphSpec) -> None:
        inputs, outputs = _bound_tensors(self.bundle, self.graph, session.outputs)
        sessions.check_contract(session.run, graph, inputs, outputs)

    @property
    def context_length(self) -> int:
        """The most tokens it can hold."""
        return self.bundle.context_length

    def hold(self, ids: Sequence[int], on_progress: OnProgress | None = None) -> int:
        """Hold tokens and nothing else: to the bit what a fresh engine holds of a prompt.

        Args:
            ids: a prompt without its last token, which is run alone.
            on_progress: told, after each piece of it, the tokens run and those to be run.

        Returns:
            How many of them it held already and did not run again.

        Raises:
            RequestError: they do not fit the context, or an id is outside the vocabulary; what
                was held is held still.
        """
        steps = self.hold_in_steps(ids)
        held = next(steps)
        for done in steps:
            if on_progress is not None:
                on_progress(done - held, len(ids) - held)
        return held

    def hold_in_steps(
        self, ids: Sequence[int], most: Callable[[], int] | None = None, stop: int = 0
    ) -> Iterator[int]:
        """As `hold`, one piece after another; another runner may run between two of them.

        Whoever does not finish it leaves an engine that holds the pieces run so far.

        Args:
            ids: as of `hold`.
            most: called before each piece; the most tokens to run in it.
            stop: a number of tokens at which a piece ends, so that a snapshot can be taken.

        Yields:
            How many of the tokens are held: at first those that need not be run again, then after
            each piece.

        Raises:
            RequestError: as `hold`, before the first number.
        """
        self._refuse(ids, 0)
        wanted = self._course_of(len(ids))
        same = common_prefix(self.tokens, ids)
        self.rewind(self.reusable(self._prompt_run.shared(wanted, same)))
        yield len(self.tokens)
        while len(self.tokens) < len(ids):
            self._run_piece(ids, 0, wanted, most() if most else None, stop)
            yield len(self.tokens)

    def saved_by(self, snapshot: Snapshot, ids: Sequence[int]) -> int:
        """How many tokens `hold` need not run if a snapshot is restored before it.

        Args:
            snapshot: of an engine of the same bundle.
            ids: as of `hold`.
        """
        same = common_prefix(snapshot.tokens, ids)
        held = snapshot.prompt_run.shared(self._course_of(len(ids)), same)
        return held if self._cache.holds(held, len(snapshot.tokens)) else 0

    def add(self, ids: Sequence[int], on_progress: OnProgress | None = None) -> None:
        """Add tokens after those it holds, in pieces: Ctrl-C stops between two of them.

        Arguments and errors as `hold`.
        """
        self._refuse(ids, len(self.tokens))
        self._run_pieces(ids, self._course_of(len(ids)), on_progress)

    def _course_of(self, length: int) -> PromptRun:
        in_float = self._prompts is not None and length > float_prompts.FEWEST
        return PromptRun(length, in_float)

    def _run_pieces(
        self, ids: Sequence[int], prompt_run: PromptRun, on_progress: OnProgress | None = None
    ) -> None:
        """Run the last of some tokens the way `prompt_run` says; no outputs are wanted."""
        first, end = len(self.tokens), len(self.tokens) + len(ids)
        while len(self.tokens) < end:
            self._run_piece(ids, first, prompt_run)
            if on_progress is not None:
                on_progress(len(self.tokens) - first, len(ids))

    def _run_piece(
        self,
        ids: Sequence[int],
        first: int,
        prompt_run: PromptRun,
        most: int | None = None,
        stop: int = 0,
    ) -> None:
        """Run the next of some tokens, the first of which has the position `first`."""
        held, end = len(self.tokens), first + len(ids)
        most = min(most or self._prefill_chunk, self._prefill_chunk)
        if prompt_run.in_float:  # the weights are made float for each piece
            most = self._prefill_chunk
        border = prompt_chunks.end_of_piece(held, end, most)
        if held < stop < border and stop % prompt_chunks.UNIT == 0:
            border = stop
        piece = ids[held - first : border - first]
        if prompt_run.in_float and len(piece) > 1:  # one alone is decoded, which is much faster
            self._reserve(len(piece))
            self._run_bound(self._bind(len(piece), 0, self._prompts), piece, range(0))
        else:  # the graph of candidates takes no piece of which no row is wanted
            self._run(piece, range(len(piece) - 1, len(piece)))
        if end == prompt_run.length:
            self._prompt_run = dataclasses.replace(prompt_run, left=len(self.tokens))

    def _prefill(
        self, ids: Sequence[int], on_progress: OnProgress | None = None
    ) -> list[np.ndarray]:
        self.check_prompt(ids)

        def report(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(done, total + 1)

        self.add(ids[:-1], report)
        outputs = [array.copy() for array in self._extend(ids[-1:])]
        report(len(ids), len(ids) - 1)
        return outputs

    def _extend(self, ids: Sequence[int]) -> list[np.ndarray]:
        """Run a few tokens in a binding that is kept; one row of outputs for each."""
        self.check_prompt(ids)
        self._reserve(len(ids))
        if len(ids) not in self._bindings:
            self._bindings[len(ids)] = self._bind(len(ids), len(ids))
        return self._run_bound(self._bindings[len(ids)], ids, range(len(ids)))

    def retractable(self, count: int) -> int:
        """How many tokens, at most `count`, can follow one more and be taken back afterwards."""
        first = len(self.tokens) + 1
        count = min(count, self.context_length - first)
        while count > 0 and not self._cache.holds(first, first + count):
            count -= 1
        return max(count, 0)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Where a sliding window has moved on too far, they are run again, as a prompt is: see
        `reusable`.
        """
        if not 0 <= length <= len(self.tokens):
            raise ValueError(f"cannot rewind {len(self.tokens)} tokens to {length}")
        kept = self.tokens[:length]
        del self.tokens[self.reusable(length) :]
        self._cache.reached = len(self.tokens)
        self._prompt_run = self._prompt_run.cut(len(self.tokens))
        if len(self.tokens) < length:
            self._run_pieces(kept[:-1], self._course_of(length - 1))
            self._run(kept[-1:], range(1))

    def reusable(self, length: int) -> int:
        """How many of the first `length` tokens it holds need not be run again: all, or none."""
        return length if self._cache.holds(length) else 0

    def snapshot(self) -> Snapshot:
        """What it holds, to be given to `restore`: views, which the next run changes."""
        self._recover()
        return Snapshot(list(self.tokens), self._cache.filled(), self._prompt_run)

    def restore(self, snapshot: Snapshot) -> None:
        """Hold what an engine of the same bundle held, and nothing else.

        Raises:
            RequestError: the tokens do not fit the context, or an id is outside the vocabulary.
        """
        self.tokens.clear()
        self._cache.reached = 0
        self._prompt_run = PromptRun()
        self.check_prompt(snapshot.tokens)
        self._reserve(len(snapshot.tokens))
        self._cache.fill(snapshot.filled)
        self._cache.reached = len(snapshot.tokens)
        self.tokens.extend(snapshot.tokens)
        self._prompt_run = snapshot.prompt_run

    def layout(self, length: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Data type and shape of each array that a snapshot of `length` tokens has."""
        return self._cache.layout(length)

    @property
    def cache_bytes(self) -> int:
        """What keys, values and rotary tables take now, in bytes."""
        return self._cache.num_bytes

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Refuse tokens that cannot be added.

        Raises:
            RequestError: there are none, they do not fit the context, or an id is outside the
                vocabulary.
        """
        self.check(ids, len(self.tokens))

    def check(self, ids: Sequence[int], held: int = 0) -> None:
        """Refuse tokens that cannot be run after so many; errors as `check_prompt`."""
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        self._refuse(ids, held)

    def _refuse(self, ids: Sequence[int], held: int) -> None:
        total = held + len(ids)
        if total > self.context_length:
            raise RequestError(
                f"the text has {total:,} tokens, but the bundle's context holds "
                f"{self.context_length:,}; shorten it"
            )
        for token in ids:
            if not 0 <= token < self.bundle.vocabulary_size:
                raise RequestError(
                    f"token id {token} is outside the vocabulary of {self.bundle.vocabulary_size:,}"
                )

    def _recover(self) -> None:
        if self._cache.reached != len(self.tokens):  # a run was interrupted
            self.rewind(len(self.tokens))

    def _reserve(self, more: int) -> None:
        self._recover()
        needed = len(self.tokens) + more
        if needed > self._cache.capacity:
            self._bindings.clear()  # they are bound to buffers that are now replaced
            self._cache.reserve(needed)

    def _run(self, ids: Sequence[int], positions: range) -> list[np.ndarray]:
        self._reserve(len(ids))
        return self._run_bound(self._bind(len(ids), len(positions)), ids, positions)

    def _bind(
        self, length: int, num_logits: int, session: sessions.Session | None = None
    ) -> Binding:
        cache = self._cache
        return Binding(
            session or self._session,
            self._embedding,
            cache.buffers,
            cache.tables,
            length,
            num_logits,
        )

    def _run_bound(
        self, binding: Binding, ids: Sequence[int], positions: Sequence[int]
    ) -> list[np.ndarray]:
        """Add tokens to the text; the outputs have a row for each position."""
        total = len(self.tokens) + len(ids)
        binding.fill(ids, [total], positions)
        self._cache.reached = total  # what an interrupted run has written is known by it
        outputs = binding.run()
        self.tokens.extend(ids)
        return [array[0] for array in outputs]

    def bind_rows(self, cache: KVCache, rows: int) -> Binding:
        """The same graph over another cache: one token for each of its first texts."""
        first = {name: buffer[:rows] for name, buffer in cache.buffers.items()}
        return Binding(self._session, self._embedding, first, cache.tables, 1, 1, rows)


class Engine(TokenRunner):
    """Runs the graph that returns all logits.

    Args:
        bundle: opened; its files are checked against their hashes here.
        threads: for one operator; `None` lets onnxruntime take the physical cores.
        texts: as of `TokenRunner`.

    Raises:
        BundleError: a file has changed, or the graph does not keep its contract.
        EdgeError: there is not enough memory; see `edge_demo.engine.memory`.
        RequestError: `threads` is out of range.
    """

    def __init__(
        self, bundle: Bundle, threads: int | None = None, texts: int = 1, force: bool = False
    ) -> None:
        outputs = [sessions.all_logits(bundle)]
        super().__init__(bundle, bundle.engine, outputs, threads, texts, force)

    def prefill(self, ids: Sequence[int], on_progress: OnProgress | None = None) -> np.ndarray:
        """Add tokens after those it holds, the last one alone; see
        `edge_demo.engine.prompt_chunks`.

        Args:
            ids: at least one.
            on_progress: called after each chunk with (tokens run, all of them).

        Returns:
            Logits after the last of them, float32 `(vocabulary_size,)`.

        Raises:
            RequestError: they do not fit the context, or an id is outside the vocabulary.
        """
        return self._prefill(ids, on_progress)[0][0]

    def decode(self, token: int) -> np.ndarray:
        """Add one token.

        Returns:
            Logits after it, float32 `(vocabulary_size,)`; the array is used again by the next call.

        Raises:
            RequestError: the context is full, or the id is outside the vocabulary.
        """
        return self._extend((token,))[0][0]

    def extend(self, ids: Sequence[int]) -> list[np.ndarray]:
        """Add a few tokens at once; the logits after each, as `decode` returns them."""
        return list(self._extend(ids)[0])

    def all_logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Add tokens and yield the logits after each of them, in chunks of bounded size.

        Yields:
            float32 `(chunk, vocabulary_size)`, together one row for each id.
        """
        self.check_prompt(ids)
        for first in range(0, len(ids), _SCORE_CHUNK):
            chunk = ids[first : first + _SCORE_CHUNK]
            yield self._run(chunk, range(len(chunk)))[0]


class CandidateEngine(TokenRunner):
    """Runs the graph that returns the most likely tokens: less work, and nothing else to copy.

    Where the head's table is in two planes, the graph multiplies by the high one, and what the low
    one adds is computed here for the tokens that it returns: see `edge_demo.engine.low_plane`.

    Raises:
        BundleError: as `Engine`, or the bundle has no such graph.
        RequestError: `threads` is out of range.
    """

    def __init__(
        self, bundle: Bundle, threads: int | None = None, texts: int = 1, force: bool = False
    ) -> None:
        graph = bundle.candidates
        if graph is None:
            raise BundleError(f"the bundle {bundle.path} has no graph that returns candidates")
        super().__init__(bundle, graph, sessions.candidates(bundle), threads, texts, force)
        self._low_plane = LowPlane.of(bundle)

    def prefill(self, ids: Sequence[int], on_progress: OnProgress | None = None) -> Candidates:
        """Add tokens after those it holds; the candidates after the last of them.

        Arguments as `Engine.prefill`.

        Raises:
            RequestError: they do not fit the context, or an id is outside the vocabulary.
        """
        return self.candidates(self._prefill(ids, on_progress), 0)

    def decode(self, token: int) -> Candidates:
        """Add one token; the arrays returned are used again by the next call.

        Raises:
            RequestError: the context is full, or the id is outside the vocabulary.
        """
        return self.extend((token,))[0]

    def extend(self, tokens: Sequence[int]) -> list[Candidates]:
        """Add a few tokens at once; the candidates after each, as `decode` returns them."""
        outputs = self._extend(tokens)
        return [self.candidates(outputs, row) for row in range(len(tokens))]

    def candidates(self, outputs: Sequence[np.ndarray], row: int) -> Candidates:
        """The candidates in one row of what the graph returned."""
        ids, logits, *hidden = (array[row] for array in outputs)
        if self._low_plane is not None:
            logits = self._low_plane.logits(ids, logits, *hidden)
        return Candidates(ids, logits)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first tokens of two texts are the same."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def _bound_tensors(
    bundle: Bundle, graph: GraphSpec, outputs: Sequence[TensorSpec]
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The inputs and outputs that a call binds, with as many layers as the bundle has."""
    windows = {window.name for window in bundle.windows}
    past = [
        TensorSpec(
            s.name,
            "int8" if s.dtype == "int8" else "float32",
            (
                "batch",
                s.shape[1],
                s.shape[2] if s.shape[2] in windows else "capacity",
                s.shape[3],
            ),
        )
        for s in graph.inputs
        if s.name.startswith("past_key_values.") and len(s.shape) == 4
    ]
    tables = [
        TensorSpec(f"{rope.name}.{part}", "float32", ("rope_length", rope.dims))
        for rope in bundle.ropes
        for part in ("cos", "sin")
    ]
    inputs = [
        TensorSpec("inputs_embeds", "float32", ("batch", "sequence", bundle.embedding.width)),
        TensorSpec("seqlens_k", "int32", ("batch",)),
        TensorSpec("total_sequence_length", "int32", ()),
        TensorSpec("logit_positions", "int64", ("num_logits",)),
    ]
    present = [dataclasses.replace(s, name=present_name(s.name)) for s in past]
    return [*inputs, *tables, *past], [*outputs, *present]
