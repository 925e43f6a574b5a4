"""The memory of a training step is estimated, said where it is much, and refused where it is too
much."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from gemma_keras import GemmaBackbone, GemmaCausalLM, GemmaConfig, LayerSpec
from gemma_keras.model.token_loss import tokens_of_chunk
from gemma_keras.model.training import FOR_MEMORY
from gemma_keras.train import memory
from gemma_keras.train.memory import check_fits, step_memory
from tests.models import TEXT, chat_tokenizer_model, write_tiny_hf

pytestmark = pytest.mark.keras

GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    write_tiny_hf(folder, "gemma3")  # of some depth: checkpointing keeps three blocks
    (folder / "tokenizer.model").write_bytes(chat_tokenizer_model())
    return folder


def load(folder, optimizer=None, **options):
    model = GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=96, **options)
    model.compile(optimizer or keras.optimizers.Adam())
    return model


def test_each_part_is_what_it_is_of(folder):
    model = load(folder)
    found = step_memory(model, 2, 96)
    numbers = sum(int(np.prod(v.shape)) for v in model.variables)
    assert found.weights == pytest.approx(4 * numbers, rel=0.01)
    assert 4 * numbers <= found.gradients < 12 * numbers
    assert found.optimizer == pytest.approx(8 * numbers, rel=0.05)
    assert found.total == found.weights + found.more
    assert step_memory(model, 4, 96).activations == pytest.approx(2 * found.activations)
    assert step_memory(model, 2, 192).activations >= 2 * found.activations
    vocabulary = model.backbone.config.vocabulary_size
    chunk = min(2 * 96, tokens_of_chunk(model.backbone.token_embedding))
    assert found.logits == 4 * chunk * vocabulary * 3


@pytest.mark.parametrize(
    ("optimizer", "numbers"),
    [
        (keras.optimizers.SGD(), 0),
        (keras.optimizers.SGD(momentum=0.9), 1),
        (keras.optimizers.Adam(), 2),
        (keras.optimizers.Adam(gradient_accumulation_steps=2), 3),
    ],
)
def test_an_optimizer_keeps_as_much_as_it_does(folder, optimizer, numbers):
    model = load(folder, optimizer)
    trained = step_memory(model, 1, 96)
    total = sum(4 * int(np.prod(v.shape)) for v in model.trainable_variables)
    assert trained.optimizer / total == pytest.approx(numbers, abs=0.02)


def test_lora_and_checkpointing_take_less(folder):
    model = load(folder)
    whole = step_memory(model, 8, 96)
    assert step_memory(model, 8, 96, True).activations < whole.activations
    model.enable_lora(rank=2)
    model.compile(keras.optimizers.Adam())
    found = step_memory(model, 8, 96)
    assert found.gradients + found.optimizer < (whole.gradients + whole.optimizer) / 4


def test_what_cannot_fit_is_refused_with_figures(folder, monkeypatch, capsys):
    model = load(folder)
    needed = step_memory(model, 4, 96)
    assert check_fits(model, 4, 96, free=100 * GB) == ""  # too little to speak of
    monkeypatch.setattr(memory, "_WORTH_SAYING", 1000)
    assert "GB of memory for a step (weights 0.0, gradients" in (
        check_fits(model, 4, 96, free=100 * GB)
    )
    tight = check_fits(model, 4, 96, free=int(0.9 * needed.more))
    for option in (
        "gradient_checkpointing=True",
        "batch_size=1",
        "half of sequence_length",
        "LoRA",
    ):
        assert f"{option} would take" in tight
    with pytest.raises(MemoryError, match=r"a step cannot fit: about .* GB are free beside"):
        check_fits(model, 4, 96, free=needed.more // 2)
    monkeypatch.setattr(memory, "free_memory", lambda: needed.more // 100)
    with pytest.raises(MemoryError, match="batch_size=1 would take"):
        model.fit(TEXT.splitlines()[:4], batch_size=4, verbose=0)
    monkeypatch.setattr(memory, "free_memory", lambda: needed.more)
    model.fit(TEXT.splitlines()[:4], batch_size=4, verbose=2)
    assert "GB are free beside the weights" in capsys.readouterr().out


@pytest.mark.backends("jax")  # the others do not say what a step will take
def test_qlora_takes_half_of_what_lora_takes(record_property):
    """Where weights are most of it, as with one row and checkpointing."""
    import jax

    def bytes_of(mode):
        layer = LayerSpec(num_heads=2, num_kv_heads=1, head_dim=128, ffw_dim=1024, query_scale=0.1)
        config = GemmaConfig(
            vocabulary_size=131_072, hidden_dim=512, layers=(layer,) * 3, embedding_scale=23.0
        )
        backbone = GemmaBackbone(config, dtype="float32", gradient_checkpointing=True)
        model = GemmaCausalLM(backbone)
        if mode:
            model.quantize(mode, filters=lambda layer: layer.name != "token_embedding")
            model.quantize("int8", filters="token_embedding")
        model.enable_lora(4, targets="all-linear")
        model.compile(keras.optimizers.Adam())
        ids = np.ones((1, 512), "int32")
        data = ({"token_ids": ids, "padding_mask": ids}, ids, np.ones((1, 512), "float32"))
        model._symbolic_build(data_batch=data)
        state = model._get_jax_state(
            trainable_variables=True,
            non_trainable_variables=True,
            optimizer_variables=True,
            metrics_variables=True,
        )
        step = jax.jit(model.train_step, donate_argnums=0, compiler_options=FOR_MEMORY)
        found = step.lower(state, data).compile().memory_analysis()
        return found.argument_size_in_bytes + found.temp_size_in_bytes

    lora = bytes_of(None)
    for mode in ("int8", "int4"):
        found = bytes_of(mode)
        record_property(f"bytes of a step, {mode}", f"{found:,}, {found / lora:.2f} of LoRA's")
        assert found < lora / 2
