"""LoRA adapters as files: their way to PEFT and llama.cpp and back, and what is refused."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaCausalLM, named_config, open_checkpoint
from gemma_keras.checkpoints.adapters.read import read_adapter
from gemma_keras.checkpoints.adapters.write import Base, write_gguf_adapter, write_peft_adapter
from gemma_keras.checkpoints.low_rank import Adapter, Pair
from gemma_keras.errors import CheckpointError
from gemma_keras.model import lora
from gemma_keras.sizes import SIZES
from tests.gemma_keras.lora_models import IDS, LENGTH, adapted, by_hand, fill, load, near, quiet
from tests.models import GENERATIONS, shallow, tiny_hf, write_tiny_hf

pytestmark = pytest.mark.keras


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_tiny_hf(folder, "gemma3", **shallow("gemma3"))
    return folder


def assert_merged_alike(path, base, model):
    """An adapter that is merged while its base is read gives the model's own merged weights."""
    merged, weights = open_checkpoint(path, base=base), model.backbone.weight_source()
    for name in weights:
        assert np.abs(merged.weights[name] - weights[name]).max() < 1e-5


# --- PEFT ----------------------------------------------------------------------------------------

SETTINGS = [
    {},
    {"rslora": True},
    {"targets": None, "alpha": None},
    {"targets": ["layers.1.attention.query", "layers.0.mlp.up", "layers.1.mlp.up"]},
]


def with_peft(generation, folder, path):
    import peft
    import torch

    base = tiny_hf(generation, **shallow(generation))
    with quiet():
        model = peft.PeftModel.from_pretrained(base, path).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS).long()).logits.numpy(), model


@pytest.mark.backends("torch")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_peft_loads_what_is_saved(folder, settings, tmp_path):
    model = adapted(folder, **settings)
    expected = model.logits(IDS)
    model.save_adapter(tmp_path / "adapter")
    found, wrapped = with_peft("gemma3", folder, tmp_path / "adapter")
    near(found, expected)
    assert wrapped.peft_config["default"].use_rslora == settings.get("rslora", False)
    other = load(folder)
    other.load_adapter(tmp_path / "adapter")
    np.testing.assert_array_equal(other.logits(IDS), expected)
    other.save_adapter(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        first, second = ((tmp_path / n / name).read_bytes() for n in ("adapter", "again"))
        assert first == second
    assert_merged_alike(tmp_path / "adapter", folder, model)


@pytest.mark.backends("torch")
def test_each_matrix_may_have_a_rank_and_alpha_of_its_own(folder, tmp_path):
    import peft
    import torch

    base = tiny_hf("gemma3", **shallow("gemma3"))
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj", "o_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 5, "up_proj": 2},
        alpha_pattern={"layers.0.self_attn.o_proj": 9},
        lora_dropout=0.25,
        init_lora_weights=False,
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    with quiet():
        wrapped = peft.get_peft_model(base, config).eval()
        wrapped.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = wrapped(input_ids=torch.tensor(IDS).long()).logits.numpy()
    model = load(folder)
    model.load_adapter(tmp_path / "theirs")
    near(model.logits(IDS), expected)
    assert lora.values_of(model.backbone).dropout == 0.25
    model.save_adapter(tmp_path / "ours")
    near(with_peft("gemma3", folder, tmp_path / "ours")[0], expected)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["use_rslora"] and written["lora_dropout"] == 0.25
    assert len(written["rank_pattern"]) == 3 and len(written["alpha_pattern"]) == 1


@pytest.mark.backends("torch")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_goes_to_peft_and_back(generation, dtype, tmp_path):
    write_tiny_hf(tmp_path / "base", generation, **shallow(generation))
    model = adapted(tmp_path / "base")
    model.save_adapter(tmp_path / "adapter", dtype=dtype)
    expected = model.logits(IDS)
    found, _ = with_peft(generation, tmp_path / "base", tmp_path / "adapter")
    near(found, expected, tolerance=0.2)
    other = load(tmp_path / "base")
    other.load_adapter(tmp_path / "adapter")
    near(found, other.logits(IDS))


@pytest.mark.backends("torch")
def test_each_adapter_is_saved_by_its_name(folder, tmp_path):
    model = adapted(folder, name="one")
    one = model.logits(IDS)
    model.enable_lora(rank=2, name="two")
    fill(model, seed=1)
    two = model.logits(IDS)
    for name in (None, "one", "two"):
        model.save_adapter(tmp_path / str(name), name)
    other = load(folder)
    for name, expected in (("one", one), ("two", two), ("None", two)):
        other.load_adapter(tmp_path / name, name)
        np.testing.assert_array_equal(other.logits(IDS), expected)
    with pytest.raises(ValueError, match="no adapter 'three'; there are: one, two, None"):
        other.save_adapter(tmp_path / "three", "three")
    with pytest.raises(ValueError, match="an adapter 'one' already"):
        other.load_adapter(tmp_path / "one", "one")


# Each name that the guide promises, and the matrix of a block that it is.
NAMES = {
    "attention.query": ("query", "q_proj"),
    "attention.key": ("key", "k_proj"),
    "attention.value": ("value", "v_proj"),
    "attention.output": ("output", "attention_output", "o_proj"),
    "mlp.gate": ("gate", "gate_proj"),
    "mlp.up": ("up", "up_proj"),
    "mlp.down": ("down", "down_proj"),
}


@pytest.mark.backends("torch")
@pytest.mark.parametrize("size", SIZES)
def test_every_target_of_every_size_goes_to_both_files_and_back(size, tmp_path):
    """At full depth and width, with matrices of rank 1, of which no two are alike."""
    config = named_config(size)
    specs = lora.matrices(config)
    for matrix, names in NAMES.items():
        expected = [f"layers.{i}.{matrix}" for i in range(len(config.layers))]
        for name in names:
            assert lora.chosen(config, name) == expected
        assert lora.chosen(config, [expected[-1]]) == expected[-1:]
        module = specs[expected[0]].hf.removesuffix(".weight")
        assert lora.chosen(config, [module]) == expected[:1]
    assert lora.chosen(config, "all-linear") == list(specs)
    random = np.random.default_rng(0)
    pairs = {
        name: Pair(
            random.normal(size=(spec.shape[0], 1)).astype("float32"),
            random.normal(size=(1, spec.shape[1])).astype("float32"),
            2.0,
        )
        for name, spec in specs.items()
    }
    base = Base({"repository": "a/b"}, {})
    write_peft_adapter(tmp_path / "peft", Adapter(pairs), config, base)
    paths = [tmp_path / "peft"]
    if SIZES[size].causal:
        write_gguf_adapter(tmp_path / "adapter.gguf", Adapter(pairs), config)
        paths.append(tmp_path / "adapter.gguf")
    for path in paths:
        found = read_adapter(path, config).adapter()
        assert found.pairs.keys() == pairs.keys()
        for name, pair in found.pairs.items():
            np.testing.assert_array_equal(pair.a, pairs[name].a)
            np.testing.assert_array_equal(pair.b, pairs[name].b)
            assert pair.alpha == 2


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "adapter"
    adapted(folder).save_adapter(path)
    return path


def changed(saved, tmp_path, **settings):
    path = shutil.copytree(saved, tmp_path / "adapter")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | settings))
    return path


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"bias": "all"}, "biases"),
        ({"r": 4}, "gives the rank 4"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_expressed_is_refused_by_name(
    saved, folder, settings, said, tmp_path
):
    model = load(folder)
    with pytest.raises(CheckpointError, match=said):
        model.load_adapter(changed(saved, tmp_path, **settings))
    assert model.adapters == ()


@pytest.mark.backends("torch")
def test_whole_tables_are_refused(folder, tmp_path):
    import peft

    base = tiny_hf("gemma3", **shallow("gemma3"))
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
    with quiet():
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="changes token_embedding, and LoRA here stands"):
        load(folder).load_adapter(tmp_path / "adapter")


@pytest.mark.backends("torch")
def test_an_adapter_for_another_size_or_base_is_refused(saved, tmp_path):
    write_tiny_hf(tmp_path / "wide", "gemma3", **shallow("gemma3"), intermediate_size=96)
    model = load(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"of shape \[96, 160\], but .* \[96, 96\]"):
        model.load_adapter(saved, check_base=False)
    write_tiny_hf(tmp_path / "other", "gemma3", seed=7, **shallow("gemma3"))
    model = load(tmp_path / "other")
    with pytest.raises(CheckpointError, match="was trained on another base model: the norm"):
        model.load_adapter(saved)
    model.load_adapter(saved, check_base=False)
    assert model.active_adapter == "default"


@pytest.mark.backends("torch")
def test_a_base_is_known_in_other_precisions_and_not_when_a_norm_was_tuned(folder, saved):
    for dtype in ("bfloat16", "float16"):
        model = GemmaCausalLM.from_preset(folder, dtype=dtype, sequence_length=LENGTH)
        model.load_adapter(saved)
    model = load(folder)
    scale = model.backbone.transformer_layers[1].pre_ffw_norm.scale
    scale.assign(ops.convert_to_numpy(scale) + 0.002)
    with pytest.raises(CheckpointError, match=r"the norm layers\.1\.pre_ffw_norm has the mean"):
        model.load_adapter(saved)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("form", ["peft", "gguf"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_an_adapter_cut_short_is_told(folder, form, share, tmp_path):
    path = tmp_path / f"adapter.{form}"
    adapted(folder).save_adapter(path, format=form)
    file = path / "adapter_model.safetensors" if form == "peft" else path
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    model = load(folder)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        model.load_adapter(path)
    assert model.adapters == ()


@pytest.mark.backends("torch")
def test_values_that_are_not_finite_are_refused_both_ways(folder, saved, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = shutil.copytree(saved, tmp_path / "adapter")
    tensors = load_file(path / "adapter_model.safetensors")
    name = sorted(tensors)[3]
    tensors[name] = tensors[name].copy()
    tensors[name][-1, -1] = np.nan
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="with values that are not finite"):
        load(folder).load_adapter(path)
    model = adapted(folder)
    layer = model.backbone.transformer_layers[0].mlp.up
    layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, np.inf))
    for options in ({"format": "peft"}, {"format": "gguf"}):
        with pytest.raises(CheckpointError, match="not finite"):
            model.save_adapter(tmp_path / "bad", **options)
        assert not (tmp_path / "bad").exists()


@pytest.mark.backends("torch")
@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_a_disk_that_becomes_full_leaves_nothing(folder, form, tmp_path, monkeypatch):
    """The space is there when it is asked for, and is gone when the matrices are written."""
    model = adapted(folder)
    path = tmp_path / "adapter"

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CheckpointError, match="no space was left while writing"):
        model.save_adapter(path, format=form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.backends("torch")
def test_an_adapter_replaces_an_adapter_alone(folder, saved, tmp_path):
    model = adapted(folder)
    path = shutil.copytree(saved, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="already exists"):
        model.save_adapter(path)
    model.save_adapter(path, overwrite=True)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="will not be overwritten"):
        model.save_adapter(path, overwrite=True)
    with pytest.raises(ValueError, match="format is 'onnx'; it must be"):
        model.save_adapter(tmp_path / "x", format="onnx")
    with pytest.raises(CheckpointError, match="dtype is 'int8'; choose one of"):
        model.save_adapter(tmp_path / "x", dtype="int8")
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match="is not an adapter: neither a folder"):
            load(folder).load_adapter(missing)


# --- llama.cpp -----------------------------------------------------------------------------------


@pytest.mark.backends("torch")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_gguf_adapter_comes_back(generation, rslora, tmp_path):
    base, path = tmp_path / "base", tmp_path / "adapter.gguf"
    write_tiny_hf(base, generation, **shallow(generation))
    model = adapted(base, rslora=rslora)
    model.save_adapter(path, format="gguf")
    other = load(base)
    other.load_adapter(path, name="mine")
    near(other.logits(IDS), model.logits(IDS))
    assert other.adapters == ("mine",)
    assert_merged_alike(path, base, model)
    reader = gguf.GGUFReader(path)  # the package of llama.cpp's authors
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["general.architecture"].contents() == generation
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    last = lora.layers_of(model.backbone)["layers.1.mlp.down"]
    for half, matrix in (("a", last.lora_kernel_a), ("b", last.lora_kernel_b)):
        found = tensors[f"blk.1.ffn_down.weight.lora_{half}"]
        np.testing.assert_array_equal(found, ops.convert_to_numpy(matrix).T)


@pytest.mark.backends("torch")
def test_scales_of_a_gguf_adapter_are_put_into_one(folder, tmp_path):
    model = adapted(folder, targets=["query", "down"])
    query = model.backbone.transformer_layers[0].attention.query
    query.lora_alpha = 11.0
    model.save_adapter(tmp_path / "adapter.gguf", format="gguf")
    other = load(folder)
    other.load_adapter(tmp_path / "adapter.gguf")
    near(other.logits(IDS), by_hand(model))
