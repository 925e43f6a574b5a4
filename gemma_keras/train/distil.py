"""Distillation: a student learns what a teacher says of each token, and not the text alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from gemma_keras.causal_lm import GemmaCausalLM
from gemma_keras.model.by_chunks import summed
from gemma_keras.model.divergence import (
    FORWARD,
    REVERSE,
    divergences,
    log_probabilities,
    of_likeliest,
)
from gemma_keras.model.losses import Sums, sums_of_logits, token_weights
from gemma_keras.model.token_loss import tokens_of_chunk
from gemma_keras.train.examples import Example
from gemma_keras.train.teacher_targets import (
    LOG_PROBABILITIES,
    TOKENS,
    TeacherTargets,
    check_teacher,
)
from gemma_keras.train.tuner import Tuner, is_number


class Distiller(Tuner):
    """Teaches a student the next-token distributions of a teacher.

    The loss is `text_weight` times the cross-entropy of the text, and for the rest the divergence
    from the teacher, times the temperature squared: both in nats per token that counts. Both are
    made of logits of a few tokens at a time.

    Args:
        student: a `GemmaCausalLM`, whose weights or adapter learn.
        teacher: a `GemmaCausalLM` of the same vocabulary, whose weights are frozen; or what
            `write_targets` wrote, a path or opened.
        divergence: `"forward"`, KL(teacher || student); or `"reverse"`, KL(student || teacher). A
            number b between 0 and 1 is the share of the generalized Jensen-Shannon divergence. That
            is b KL(teacher || m) + (1 - b) KL(student || m), with m = b teacher + (1 - b) student.
        temperature: of both distributions; targets on disk have one already.
        text_weight: the share of the text's own loss, 0 to 1.

    Raises:
        ValueError: an argument is out of range, or the vocabularies or tokenizers differ.
        CheckpointError: the targets cannot be read.
    """

    shown = ("divergence", "perplexity", "sparse_categorical_accuracy")

    def __init__(
        self,
        student: GemmaCausalLM,
        teacher: GemmaCausalLM | TeacherTargets | str | os.PathLike[str],
        divergence: str | float = FORWARD,
        temperature: float | None = None,
        text_weight: float = 0.0,
        **kwargs,
    ) -> None:
        super().__init__(student, **kwargs)
        between = is_number(divergence) and 0 < float(divergence) < 1
        if not between and not (isinstance(divergence, str) and divergence in (FORWARD, REVERSE)):
            raise ValueError(
                f"divergence is {divergence!r}; it must be 'forward', 'reverse' or a number "
                "between 0 and 1"
            )
        if not is_number(text_weight) or not 0 <= text_weight <= 1:
            raise ValueError(f"text_weight is {text_weight!r}; it must be 0 to 1")
        heat = 1.0 if temperature is None else temperature
        if not is_number(heat) or not 0 < heat < float("inf"):
            raise ValueError(f"temperature is {temperature!r}; it must be more than 0")
        self._kind = divergence if isinstance(divergence, str) else float(divergence)
        self._text_weight = float(text_weight)
        self._targets = self.teacher = None
        if isinstance(teacher, keras.Model):
            check_teacher(teacher, student)
            if teacher.backbone is student.backbone:
                raise ValueError("the teacher is the student itself; load it a second time")
            self.teacher = teacher
            teacher.trainable = False
        else:
            if isinstance(teacher, (str, os.PathLike)):
                teacher = TeacherTargets.open(teacher)
            if not isinstance(teacher, TeacherTargets):
                raise ValueError(
                    "the teacher must be a GemmaCausalLM or the path of targets, not "
                    f"{type(teacher).__name__}"
                )
            teacher.check_tokenizer(student)
            if temperature not in (None, teacher.temperature):
                raise ValueError(
                    f"the targets were written at a temperature of {teacher.temperature}, and "
                    f"{temperature} cannot be made of them; write them again"
                )
            temperature = teacher.temperature
            self._note(targets=teacher)
        self._temperature = 1.0 if temperature is None else float(temperature)

    def call(self, inputs, training=None, mask=None):
        """Returns hidden states of the student, and of the teacher if it is live."""
        student = self.task.backbone(inputs, training=training)
        if self.teacher is None:
            return (student,)
        return student, ops.stop_gradient(self.teacher.backbone(inputs, training=False))

    def compute_loss(
        self, x=None, y: Any = None, y_pred: Any = None, sample_weight=None, training=True
    ):
        targets = y["targets"] if isinstance(y, dict) else y
        weights = token_weights(targets, sample_weight)
        arrays = [*y_pred, ops.cast(targets, "int32"), weights]
        if self.teacher is None:
            arrays += [y[TOKENS], y[LOG_PROBABILITIES]]
        tokens = tokens_of_chunk(self.task.backbone.token_embedding)
        sums = summed(self._sums, arrays, tokens if self.teacher is None else tokens // 2)
        of_teacher, text = Sums(*sums[:4]), Sums(*sums[4:])
        share = self._text_weight

        def both(a, b):
            return (1 - share) * a + share * b

        total = of_teacher._replace(total=both(of_teacher.total, text.total))
        self._show(
            loss=total, divergence=of_teacher, perplexity=text, sparse_categorical_accuracy=text
        )
        loss = both(of_teacher.weighted, text.weighted) / ops.maximum(text.count, 1.0)
        return self._with_regularizers(loss)

    def _sums(self, hidden, *arrays):
        """The sums of some tokens' divergence, and of their text."""
        heat = self._temperature
        logits = ops.cast(self.task.backbone.token_embedding(hidden, reverse=True), "float32")
        log_q = log_probabilities(logits, heat)
        if self.teacher is None:
            targets, weights, ids, log_p = arrays
            log_p, log_q = of_likeliest(log_q, ids, log_p)
        else:
            of_teacher, targets, weights = arrays
            known = self.teacher.backbone.token_embedding(of_teacher, reverse=True)
            log_p = ops.stop_gradient(log_probabilities(known, heat))
        text = sums_of_logits(logits, targets, weights)
        found = divergences(log_p, log_q, self._kind) * heat**2
        found = ops.where(ops.not_equal(weights, 0), found, 0.0)
        total = ops.stop_gradient(ops.sum(found))
        return (ops.sum(found * weights), total, text.correct, text.count, *text)

    def _learns(self) -> dict[str, Any]:
        made = [self._kind, self._temperature, self._text_weight]
        of_targets = self._targets.identity if self._targets else None
        return super()._learns() | {"another distillation": made, "other targets": of_targets}

    def _with_targets(self, examples: Sequence[Example], show: bool = False) -> list[Example]:
        if self._targets is None:
            return list(examples)
        return [self._targets.put_beside(example) for example in examples]
