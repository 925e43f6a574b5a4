"""How much memory a training step takes, before it is taken."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np

from edge_demo.device.memory_limits import free_memory
from gemma_keras.config import GemmaConfig, LayerSpec
from gemma_keras.model.token_loss import bytes_at_once
from gemma_keras.model.training import anew

_WORTH_SAYING = 1 << 30
_CANNOT_FIT = 1.5  # times what is free: beyond it an estimate cannot be wrong enough
_CHUNKS = 3  # of logits that are there at once, with what the loss makes of them
# Numbers that a block keeps for its gradients: copies of the residual stream, of queries with keys
# and values, of scores, and of the FFN's width. Then what a backend holds beside: a factor, and
# copies of the largest trained variable while it is updated. Measured: docs/lab-notes.md.
_STREAM, _HEADS, _SCORES, _FFW = 12, 4, 3, 5
_BESIDE = {"jax": (1.25, 1), "torch": (1.2, 5), "tensorflow": (1.8, 3)}
_LIKE_ADAM = 2.0  # numbers an optimizer keeps for each that is trained
_AGAIN = 3  # times a block's, while its gradients are computed from its input


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """What a training step holds at its peak, in bytes.

    Attributes:
        weights: of the model, and of others beside it, such as a teacher.
        gradients: of what is trained.
        optimizer: its numbers for each number that is trained.
        activations: what blocks keep for their gradients.
        logits: of one chunk of tokens.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(dataclasses.astuple(self))

    @property
    def more(self) -> int:
        """What is not there before the step: all but the weights."""
        return self.total - self.weights

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {value / 1e9:.1f}" for name, value in dataclasses.asdict(self).items()
        )
        return f"about {self.total / 1e9:.1f} GB of memory for a step ({parts})"


def step_memory(
    model: keras.Model, batch_size: int, length: int, gradient_checkpointing: bool | None = None
) -> StepMemory:
    """Estimate the memory of a step.

    Args:
        model: compiled; with a `backbone`.
        batch_size: rows on this device.
        length: of a row, in tokens.
        gradient_checkpointing: by default what the backbone says.
    """
    backbone: Any = model.backbone
    config: GemmaConfig = backbone.config
    if gradient_checkpointing is None:
        gradient_checkpointing = backbone.gradient_checkpointing
    trained = sum(4 * int(np.prod(v.shape)) for v in model.trainable_variables)
    width = 4 if backbone.compute_dtype == "float32" else 2
    tokens = batch_size * length
    blocks = [_of_block(config, spec, length) * tokens * width for spec in config.layers]
    stream = 4 * config.hidden_dim * tokens
    kept = stream * len(blocks) + _AGAIN * max(blocks) if gradient_checkpointing else sum(blocks)
    factor, copies = _BESIDE[keras.config.backend()]
    largest = max((4 * int(np.prod(v.shape)) for v in model.trainable_variables), default=0)
    return StepMemory(
        weights=sum(_num_bytes(v) for v in model.variables),
        gradients=trained + copies * largest,
        optimizer=int(trained * _numbers_of(model.optimizer)),
        activations=int(factor * kept),
        logits=_CHUNKS * bytes_at_once(backbone.token_embedding, tokens),
    )


def _of_block(config: GemmaConfig, spec: LayerSpec, length: int) -> int:
    """Numbers that a block keeps for each token."""
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    # PyTorch's fused attention stores no scores
    fused = keras.config.backend() == "torch" and spec.attention_soft_cap is None
    scores = 0 if fused else spec.num_heads * length
    return _STREAM * config.hidden_dim + _HEADS * heads + _SCORES * scores + _FFW * spec.ffw_dim


def _num_bytes(variable: Any) -> int:
    size = {"bfloat16": 2, "int4": 1}.get(variable.dtype) or np.dtype(variable.dtype).itemsize
    return int(np.prod(variable.shape)) * size


def _numbers_of(optimizer: Any) -> float:
    """How many numbers an optimizer keeps for each number of a matrix that is trained."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # a loss scale is one number
    try:
        like = anew(optimizer)
    except TypeError:  # one of the user's own, whose configuration is not whole
        return _LIKE_ADAM
    matrix = keras.Variable(np.zeros((16, 16), np.float32), name="like")
    before = sum(int(np.prod(v.shape)) for v in like.variables)
    like.build([matrix])
    return (sum(int(np.prod(v.shape)) for v in like.variables) - before) / 256


def check_fits(model: keras.Model, batch_size: int, length: int, free: int | None = None) -> str:
    """Say how much memory a step takes, if that is much.

    Args:
        model: as of `step_memory`.
        batch_size: as of `step_memory`.
        length: as of `step_memory`.
        free: bytes; by default what the device has. On accelerators, and on several devices,
            nothing is said.

    Returns:
        A sentence, or an empty text.

    Raises:
        MemoryError: the step cannot fit; says what would take less.
    """
    if not _on_a_processor() or keras.distribution.distribution() is not None:
        return ""
    needed = step_memory(model, batch_size, length)
    free = free_memory() if free is None else free
    optimizer: Any = model.optimizer
    if free is not None and optimizer.built:  # its numbers are there already
        free += needed.optimizer
    if free is None or needed.more < min(_WORTH_SAYING, free / 2):
        return ""
    there = f"{needed}; {free / 1e9:.1f} GB are free beside the weights"
    if needed.more < free / 2:
        return there
    advice = _advice(model, batch_size, length, needed)
    if needed.more > _CANNOT_FIT * free:
        raise MemoryError(f"a step cannot fit: {there}. {advice}")
    return f"{there}. {advice}"


def _advice(model: keras.Model, batch_size: int, length: int, needed: StepMemory) -> str:
    """Settings that would take less, and how much, the best first."""
    options = {}
    if not model.backbone.gradient_checkpointing:
        options["gradient_checkpointing=True"] = step_memory(model, batch_size, length, True).total
    if batch_size > 1:
        options["batch_size=1"] = step_memory(model, 1, length).total
    if length > 1:
        options["half of sequence_length"] = step_memory(model, batch_size, length // 2).total
    if needed.gradients > needed.weights / 4:
        options["LoRA"] = needed.total - needed.gradients - needed.optimizer
    said = [
        f"{name} would take {total / 1e9:.1f} GB"
        for name, total in sorted(options.items(), key=lambda item: item[1])
        if total < 0.95 * needed.total
    ]
    return "; ".join(said)


def _on_a_processor() -> bool:
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        return jax.default_backend() == "cpu"
    if backend == "tensorflow":
        import tensorflow as tf

        return not tf.config.list_logical_devices("GPU")
    import torch

    return str(torch.get_default_device()) == "cpu" and not torch.cuda.is_available()
