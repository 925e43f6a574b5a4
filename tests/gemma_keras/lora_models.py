"""Small models with LoRA, and their logits computed without it."""

from __future__ import annotations

import contextlib
import warnings

import keras
import numpy as np
from keras import ops

from gemma_keras import GemmaCausalLM
from gemma_keras.model import lora
from tests.models import random_ids

IDS = random_ids(2, 20)
LENGTH = 80


def load(folder, **options):
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=LENGTH, **options)
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    return model


def fill(model, seed=0, size=0.2):
    """Give the adapter in the layers values that matter."""
    random = np.random.default_rng(seed)
    for layer in lora.layers_of(model.backbone).values():
        if layer.has_lora:
            for matrix in (layer.lora_kernel_a, layer.lora_kernel_b):
                matrix.assign(size * random.normal(size=matrix.shape))
    return model


def adapted(folder, **options):
    model = load(folder)
    model.enable_lora(**{"rank": 3, "alpha": 5, "targets": "all-linear"} | options)
    return fill(model)


@contextlib.contextmanager
def quiet():
    """PEFT warns of tied tables, and of names of transformers that it still uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def near(found, expected, tolerance=1e-4):
    assert np.abs(found - expected).max() < tolerance * expected.std()


def by_hand(model):
    """Logits of the model whose weights are W + alpha / rank * A @ B, computed here."""
    weights = dict(model.backbone.weight_source())
    with model.without_adapter():
        weights = {name: np.array(array) for name, array in model.backbone.weight_source().items()}
    for name, layer in lora.layers_of(model.backbone).items():
        if layer.has_lora:
            a, b = (ops.convert_to_numpy(m) for m in (layer.lora_kernel_a, layer.lora_kernel_b))
            weights[name] = weights[name] + layer.lora_alpha / layer.lora_rank * (a @ b)
    plain = GemmaCausalLM(type(model.backbone)(model.backbone.config, dtype="float32"))
    plain.backbone.load_weight_source(weights)
    return plain.logits(IDS)
