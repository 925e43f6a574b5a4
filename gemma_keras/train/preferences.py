"""Preferences: the model learns to like one answer better than another (DPO and its forms).

Sources: Rafailov et al., 2023 (arXiv:2305.18290); Zhao et al., 2023, for the hinge
(arXiv:2305.10425); Azar et al., 2023, for IPO (arXiv:2310.12036); Meng et al., 2024, for means over
tokens (arXiv:2405.14734).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from gemma_keras.causal_lm import GemmaCausalLM
from gemma_keras.model.by_chunks import summed
from gemma_keras.model.losses import Sums, token_losses, token_weights
from gemma_keras.model.token_loss import tokens_of_chunk
from gemma_keras.train.examples import Example
from gemma_keras.train.logits import log_mass, logits_of_keras
from gemma_keras.train.tuner import Tuner, check_is_task, is_number

# Losses of how much more the model prefers the chosen answer than the reference does.
FORMS: Mapping[str, Callable[[Any, float], Any]] = {
    "sigmoid": lambda delta, beta: ops.softplus(-beta * delta),
    "hinge": lambda delta, beta: ops.relu(1.0 - beta * delta),
    "ipo": lambda delta, beta: ops.square(delta - 1.0 / (2.0 * beta)),
    "sigmoid_norm": lambda delta, beta: ops.softplus(-beta * delta),
}
_OF_MEANS = ("ipo", "sigmoid_norm")  # of log-probabilities a token, not of their sums


class PreferenceTuner(Tuner):
    """Teaches a task to prefer some answers to others, by direct preference optimization.

    Rows are `{"prompt", "chosen", "rejected"}`, texts or messages. Without a prompt, it is what
    both answers begin with. Delta is the log-probability of the chosen answer over that of the
    rejected one, less the same of a reference. The loss is a mean over pairs:

    * `sigmoid`: `-log(sigmoid(beta * delta))`, DPO's.
    * `hinge`: `max(0, 1 - beta * delta)`.
    * `ipo`: `(delta - 1 / (2 * beta))²`, of log-probabilities a token.
    * `sigmoid_norm`: DPO's, of log-probabilities a token.

    What is shown beside the loss are rewards: beta times what the model gives an answer more than
    the reference does.

    Args:
        task: a `GemmaCausalLM`, whose weights or adapter learn.
        form: one of these losses.
        beta: how much a difference counts; the more, the nearer the model stays to the reference.
        reference: a `GemmaCausalLM`. By default the task without its adapter; or, if it has none,
            as it is before training. It is asked once for each row.

    Raises:
        ValueError: an argument is out of range, or the adapter is merged.
    """

    shown = ("reward_margin", "preference_accuracy", "chosen_reward", "rejected_reward")
    _learns_pairs = True

    def __init__(
        self,
        task: GemmaCausalLM,
        form: str = "sigmoid",
        beta: float = 0.1,
        reference: GemmaCausalLM | None = None,
        **kwargs,
    ) -> None:
        super().__init__(task, **kwargs)
        if not isinstance(form, str) or form not in FORMS:
            raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}")
        if not is_number(beta) or not 0 < beta < float("inf"):
            raise ValueError(f"beta is {beta!r}; it must be more than 0")
        if reference is not None:
            check_is_task(reference, "the reference")
            if reference.backbone is task.backbone:
                raise ValueError("the reference is the model itself; leave it out")
        self._form, self._beta = form, float(beta)
        self._note(reference=reference, known={})

    def call(self, inputs, training=None, mask=None):
        """Returns hidden states."""
        return self.task.backbone(inputs, training=training)

    def compute_loss(
        self, x=None, y: Any = None, y_pred: Any = None, sample_weight=None, training=True
    ):
        weights = token_weights(y["targets"], sample_weight)
        arrays = [y_pred, y["targets"], weights, y["sign"], y["reference"]]
        tokens = tokens_of_chunk(self.task.backbone.token_embedding)
        *gains, counts, others = summed(self._sums, arrays, tokens)
        pairs = ops.cast(counts > 0, "float32")
        if self._form in _OF_MEANS:
            sizes = (counts, others)
            gains = [g / ops.maximum(n, 1.0) for g, n in zip(gains, sizes, strict=True)]
        delta = gains[0] - gains[1]
        losses = FORMS[self._form](delta, self._beta) * pairs
        shares = ops.max(weights, axis=-1)  # of a batch among those whose gradients are added up

        def sums(values):
            total = ops.stop_gradient(ops.sum(values * pairs))
            return Sums(total, total, total, ops.sum(pairs))

        chosen, rejected = (self._beta * gain for gain in gains)
        self._show(
            loss=sums(losses),
            reward_margin=sums(chosen - rejected),
            preference_accuracy=sums(ops.cast(delta > 0, "float32")),
            chosen_reward=sums(chosen),
            rejected_reward=sums(rejected),
        )
        loss = ops.sum(losses * shares) / ops.maximum(ops.sum(pairs), 1.0)
        return self._with_regularizers(loss)

    def _sums(self, hidden, targets, weights, sign, reference):
        """Of some tokens: what the model gives the two answers more than the reference does, and
        how many tokens they have; float32 `(batch,)` each."""
        logits = ops.cast(self.task.backbone.token_embedding(hidden, reverse=True), "float32")
        counts = ops.not_equal(weights, 0)
        gain = ops.where(counts, -token_losses(logits, targets)[0] - reference, 0.0)
        shares = [ops.cast(counts & (sign == one), "float32") for one in (1, -1)]
        return (
            *(ops.sum(gain * share, axis=-1) for share in shares),
            *(ops.sum(share, axis=-1) for share in shares),
        )

    def _with_targets(self, examples: Sequence[Example], show: bool = False) -> list[Example]:
        new = [example for example in examples if example.digest not in self._known]
        if new and self._reference is None and not self.task.adapters and self._has_trained:
            raise ValueError(
                "the reference is the model before training, which has ended; give evaluate these "
                "rows before fit, or a reference, or train an adapter"
            )
        if new and show:
            print(f"asking the reference for {len(new):,} pairs", flush=True)
        progress = keras.utils.Progbar(len(new), verbose=int(show), unit_name="pair")
        with self._as_reference() as model:
            for number, example in enumerate(new):
                self._known[example.digest] = _log_probabilities(model, example)
                progress.update(number + 1)
        return [self._beside(example) for example in examples]

    def _beside(self, example: Example) -> Example:
        sign = np.ones(len(example), np.int32)
        sign[example.texts[1]] = -1
        values = {"sign": sign, "reference": self._known[example.digest]}
        return dataclasses.replace(example, beside=functools.partial(dict, values))

    def _learns(self) -> dict[str, Any]:
        return super()._learns() | {"another form or beta": [self._form, self._beta]}

    @contextlib.contextmanager
    def _as_reference(self):
        if self._reference is not None or not self.task.adapters:
            yield self._reference or self.task
        else:
            with self.task.without_adapter():
                yield self.task


def _log_probabilities(model: GemmaCausalLM, example: Example) -> np.ndarray:
    """The model's log-probability of each token of both texts that counts; float32 `(length,)`."""
    found = np.zeros(len(example), np.float32)
    for text in example.texts:
        part = Example(example.ids[text], example.counts[text])
        wanted, first = np.flatnonzero(part.counts[1:]) + 1, 0
        for logits in logits_of_keras(model, part):
            where = wanted[first : first + len(logits)]
            right = logits[np.arange(len(where)), part.ids[where]]
            found[text.start + where] = right - log_mass(logits)
            first += len(where)
    return found
