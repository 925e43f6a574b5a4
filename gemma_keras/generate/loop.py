"""The generation loop: prefills all prompts at once, then decodes one token per row and step.

A compiled function is used for all prompts of about the same length. Lengths are rounded up to
`bucket`, and the end of each row is data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from gemma_keras.checkpoints.special_pieces import is_usable
from gemma_keras.generate.compiled import compiled, recorded
from gemma_keras.generate.finite import require_finite_logits
from gemma_keras.model.head import logits

_LEAST_STEP = 16  # between buckets
_NO_TOKEN = -1  # where the logits are not finite


def bucket(length: int) -> int:
    """Returns the smallest compiled length that is at least `length`.

    Longer by an eighth at most, or by 15.
    """
    step = max(_LEAST_STEP, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def _without_piece(model: keras_hub.models.CausalLM) -> Callable[[Any], Any]:
    """Returns a function that masks logits `(batch, vocabulary_size)` of ids that the tokenizer
    does not have or does not use. An embedding table may have more rows than the tokenizer has
    tokens."""
    if model.preprocessor is None:
        return lambda found: found
    usable = list(is_usable(model.preprocessor.tokenizer.proto))
    while usable and not usable[-1]:
        del usable[-1]
    if len(usable) > model.backbone.config.vocabulary_size or not usable:
        return lambda found: found
    if all(usable):
        rows = model.backbone.config.vocabulary_size
        return lambda found: found[:, : len(usable)] if len(usable) < rows else found
    mask = np.asarray(usable)[None]

    def without(found):
        # A float16 holds no less, and infinity would be taken for a fault.
        return ops.where(mask, found[:, : len(usable)], ops.cast(-6e4, found.dtype))

    return without


class GenerateFunction:
    """The compiled generation functions of a model and its sampler.

    Args:
        model: a compiled `GemmaCausalLM`, in the sense of `compile`.
    """

    def __init__(self, model: keras_hub.models.CausalLM) -> None:
        self._model = model
        self._sampler = model.sampler

        self._no_piece = _without_piece(model)

        own = type(model.sampler).__call__
        self._has_own_loop = own is not keras_hub.samplers.Sampler.__call__

        def seeds():
            return self._sampler.variables

        self._prefill = compiled(model, model.backbone.prefill, seeds)
        self._forward = recorded(model, self._run_forward)
        self._first = compiled(model, self._run_first, seeds)
        self._step = compiled(model, self._run_step, seeds, uses_up_first=True)
        self._decode = compiled(model, self._run_loop, seeds, uses_up_first=True)
        self._whole = compiled(model, self._run_sampler, seeds)
        self._check = compiled(model, self._run_check, seeds)

    def __call__(self, inputs, stop_token_ids: Sequence[int] | None = None) -> dict[str, Any]:
        """Continue a batch.

        Args:
            inputs: `token_ids` int `(batch, length)` and `padding_mask` bool or int of the same
                shape: prompts, padded on the right to the length to generate to.
            stop_token_ids: ids that end a row, or `None`.

        Returns:
            `token_ids` and `padding_mask` of the same shapes, filled in; rows end with their stop
            token.

        Raises:
            ValueError: a prompt is empty, or padded on the left.
            NotFiniteError: logits are not finite.
        """
        token_ids, lengths = self._checked(inputs)
        stops = None if stop_token_ids is None else tuple(int(i) for i in stop_token_ids)
        end = token_ids.shape[1]
        if self._has_own_loop:
            found = self._whole(token_ids, np.arange(end) < lengths[:, None], stop_token_ids=stops)
            # Its logits are not visible here, but values that are not finite stay so to the end.
            last = self._check(found)
            found = ops.convert_to_numpy(found)
            require_finite_logits(self._model, ops.convert_to_numpy(last) >= 0, lengths)
        else:
            token_ids, hidden, cache = self._run_prefill(token_ids, lengths, end)
            _, found = self._decode(
                cache,
                hidden,
                token_ids,
                lengths,
                np.int32(end),
                aligned=bool((lengths == lengths[0]).all()),
                stop_token_ids=stops,
            )
        found = ops.convert_to_numpy(found)[:, :end]
        require_finite_logits(self._model, (found >= 0).all(axis=1), lengths)
        stopped = np.isin(found, stops or ()) & (np.arange(end) >= lengths[:, None])
        return {"token_ids": found, "padding_mask": np.cumsum(stopped, axis=1) - stopped == 0}

    def stream(
        self, prompt: Sequence[int], max_length: int, stop_token_ids: Sequence[int] = ()
    ) -> Iterator[int]:
        """Continue one prompt, a token at a time.

        Args:
            prompt: its ids.
            max_length: of prompt and continuation together, in tokens.
            stop_token_ids: ids that end it; they are not yielded.

        Raises:
            ValueError: the prompt is empty, or the sampler looks at more than the next token, as
                beam search does.
            NotFiniteError: logits are not finite.
        """
        if self._has_own_loop:
            kind = type(self._sampler).__name__
            raise ValueError(f"{kind} cannot stream: it produces its tokens only at the end")
        row = np.asarray([prompt], np.int32)
        token_ids, lengths = self._checked({"token_ids": row, "padding_mask": np.ones_like(row)})
        if len(prompt) >= max_length:
            return
        _, hidden, cache = self._run_prefill(token_ids, lengths, max_length)
        token = self._first(hidden)
        for position in range(len(prompt), max_length):
            found = int(ops.convert_to_numpy(token)[0])
            require_finite_logits(self._model, [found >= 0], [position])
            if found in stop_token_ids:
                return
            yield found
            if position + 1 < max_length:
                cache, token = self._step(cache, token, np.int32(position))

    def _checked(self, inputs) -> tuple[np.ndarray, np.ndarray]:
        token_ids = ops.convert_to_numpy(inputs["token_ids"]).astype(np.int32)
        mask = ops.convert_to_numpy(inputs["padding_mask"]).astype(bool)
        lengths = mask.sum(axis=1).astype(np.int32)
        if not lengths.all():
            raise ValueError("a prompt is empty; give at least the beginning-of-sequence token")
        if (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any():
            raise ValueError("prompts must be padded on the right")
        return token_ids, lengths

    def _run_prefill(self, token_ids: np.ndarray, lengths: np.ndarray, end: int):
        """The ids with room for as many as a cache holds, the last hidden states, the cache."""
        longest, capacity = int(lengths.max()), bucket(end)
        if keras.config.backend() != "torch":  # which compiles nothing for prompts
            longest = bucket(longest)
        token_ids = np.pad(token_ids, ((0, 0), (0, capacity - token_ids.shape[1])))
        hidden, cache = self._prefill(token_ids[:, :longest], lengths, capacity=capacity)
        return token_ids, hidden, cache

    # --- what is compiled ---

    def _logits(self, hidden):
        """From `(batch, 1, hidden_dim)` to `(batch, vocabulary_size)`, or as many as the tokenizer
        has pieces."""
        found = ops.squeeze(logits(self._model.backbone.token_embedding, hidden), axis=1)
        return self._no_piece(found)

    def _sample(self, logits):
        """From `(batch, vocabulary_size)` to ids, int32 `(batch,)`; -1 if they are not finite."""
        # The maximum of values with a NaN is NaN; forbidden tokens have -inf.
        finite = ops.isfinite(ops.max(logits, axis=-1))
        if type(self._sampler) is keras_hub.samplers.GreedySampler:
            scores = logits  # the largest logit has the largest probability, which is not needed
        else:  # a sampler fails on NaN
            logits = ops.where(finite[:, None], logits, 0.0)
            scores = self._sampler.compute_probabilities(logits)
        token = ops.cast(self._sampler.get_next_token(scores), "int32")
        return ops.where(finite, token, _NO_TOKEN)

    def _run_first(self, hidden):
        """The ids after prompts, int32 `(batch,)`."""
        return self._sample(self._logits(hidden))

    def _run_forward(self, cache, token, start):
        """Returns the cache, and the logits after ids `(batch,)` at position `start`."""
        hidden, cache = self._model.backbone.call_with_cache(token[:, None], cache, start)
        return cache, self._logits(hidden)

    def _run_step(self, cache, token, start):
        """Returns the cache, and the next tokens after ids `(batch,)` at position `start`."""
        cache, logits = self._forward(cache, token, start)
        return cache, self._sample(logits)

    def _run_loop(self, cache, hidden, token_ids, lengths, end, aligned: bool, stop_token_ids):
        """Generates after the prompts until every row is done; returns the cache and the ids."""
        last_place = token_ids.shape[1] - 1
        places = ops.arange(token_ids.shape[1], dtype="int32")[None]

        def put(token_ids, token, positions, done):
            """Write a token a row; say what is done then."""
            here = ops.logical_and(places == positions[:, None], ops.logical_not(done)[:, None])
            done = ops.logical_or(done, positions + 1 >= end)
            done = ops.logical_or(done, token == _NO_TOKEN)
            for stop in stop_token_ids or ():
                done = ops.logical_or(done, token == stop)
            return ops.where(here, token[:, None], token_ids), done

        def cond(token_ids, token, positions, done, cache):
            return ops.logical_not(ops.all(done))

        def body(token_ids, token, positions, done, cache):
            # A finished row continues with the others; its tokens are ignored, and never exceed the
            # cache.
            start = positions[0] if aligned else ops.minimum(positions, last_place)
            cache, token = self._run_step(cache, ops.maximum(token, 0), start)
            positions = positions + 1
            token_ids, done = put(token_ids, token, positions, done)
            return token_ids, token, positions, done, cache

        token = self._run_first(hidden)
        token_ids, done = put(token_ids, token, lengths, lengths >= end)
        token_ids, _, _, _, cache = self._sampler.run_loop(
            cond, body, loop_vars=(token_ids, token, lengths, done, cache), model=self._model
        )
        return cache, token_ids

    def _run_sampler(self, token_ids, padding_mask, stop_token_ids):
        """With a sampler that has a loop of its own, such as beam search."""
        model = self._model
        batch_size, length = token_ids.shape
        cache = model.backbone.empty_cache(batch_size, length)
        hidden_states, cache = model.backbone.call_with_cache(token_ids, cache, 0)
        # Rows with longer prompts replay theirs: the sampler keeps what the mask marks as given.
        index = ops.min(ops.sum(ops.cast(padding_mask, "int32"), axis=-1))

        def next(prompt, cache, index):
            last = ops.slice(prompt, (0, index - 1), (ops.shape(prompt)[0], 1))
            hidden, cache = model.backbone.call_with_cache(last, cache, index - 1)
            found = logits(model.backbone.token_embedding, hidden)
            found = self._no_piece(ops.squeeze(found, axis=1))
            return found, ops.squeeze(hidden, axis=1), cache

        return self._sampler(
            next=next,
            prompt=token_ids,
            cache=cache,
            index=index,
            mask=padding_mask,
            stop_token_ids=stop_token_ids,
            hidden_states=hidden_states,
            model=model,
        )

    def _run_check(self, token_ids):
        """Returns the next tokens of full rows, int32 `(batch,)`; -1 if their logits are not
        finite."""
        lengths = ops.full((token_ids.shape[0],), token_ids.shape[1], dtype="int32")
        hidden, _ = self._model.backbone.prefill(token_ids, lengths, capacity=token_ids.shape[1])
        found = self._logits(hidden)
        return ops.where(ops.isfinite(ops.max(found, axis=-1)), 0, _NO_TOKEN)
