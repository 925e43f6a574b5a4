"""LoRA adapters, merged as they are read, against PEFT's own forward pass and merge."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemma_keras import open_checkpoint
from gemma_keras.checkpoints.hf.config import config_to_hf
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.checkpoints.source import table_chunks
from gemma_keras.errors import CheckpointError, ModelError
from tests.models import (
    GENERATIONS,
    VOCABULARY_SIZE,
    random_ids,
    relative_difference,
    tiny_hf,
    write_tiny_hf,
)

peft = pytest.importorskip("peft")

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = random_ids()
NOISE = 1e-4  # adding a product to a matrix, or its result to the matrix's, rounds differently


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder for each generation."""
    folder = tmp_path_factory.mktemp("bases")
    for generation in GENERATIONS:
        write_tiny_hf(folder / generation, generation)
    return folder


def adapter_of(model, seed=5, **options):
    """A PEFT model with random matrices in its LoRA."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": EVERYWHERE} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied tables, which is what is tested
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                scale = 0.02 if "embed" in name or "lm_head" in name else 0.1
                parameter.add_(scale * noise)
    return wrapped.eval()


def save(wrapped, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder, **options)
    return folder


def edit(folder, **changes):
    """Change the adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS).long()).logits.numpy()


def logits(checkpoint):
    """What transformers computes with a checkpoint's weights and configuration."""
    config = transformers.AutoConfig.for_model(**config_to_hf(checkpoint.config))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    specs = weight_specs(checkpoint.config).values()
    state = {
        spec.hf: torch.tensor(np.array(spec.to_file(checkpoint.weights[spec.name], "hf")))
        for spec in specs
    }
    if checkpoint.config.tied_head:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return logits_of(model)


@pytest.fixture(scope="module")
def everywhere(bases, tmp_path_factory):
    """An adapter on every matrix of a Gemma 3: its folder, and what PEFT computes with it."""
    wrapped = adapter_of(tiny_hf("gemma3"))
    folder = save(wrapped, tmp_path_factory.mktemp("adapters") / "everywhere")
    return folder, logits_of(wrapped)


OPTIONS = {
    "plain": {"target_modules": EVERYWHERE},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {
            "q_proj": 2,
            "model.layers.1.mlp.up_proj": 5,
            r"layers\.\d.self_attn.o_proj": 1,
        },
        "alpha_pattern": {"up_proj": 1, "model.layers.0.self_attn.q_proj": 9},
    },
    "few layers": {"layers_to_transform": [0, 2], "target_modules": ["q_proj"]},
    "a regular expression": {"target_modules": r".*layers\.1\..*(q|v)_proj"},
    "norms saved": {"modules_to_save": ["input_layernorm", "norm"]},
    "orthogonal": {"init_lora_weights": "gaussian", "r": 4},
}


@pytest.mark.parametrize(
    ("generation", "options"),
    [(generation, OPTIONS["plain"]) for generation in GENERATIONS]
    + list(zip(itertools.cycle(GENERATIONS), list(OPTIONS.values())[1:], strict=False)),
    ids=[*GENERATIONS, *list(OPTIONS)[1:]],
)
def test_an_adapter_is_merged_as_peft_merges_it(generation, options, bases, tmp_path):
    wrapped = adapter_of(tiny_hf(generation), **options)
    save(wrapped, tmp_path / "adapter")
    checkpoint = open_checkpoint(tmp_path / "adapter", base=bases / generation)
    unchanged = open_checkpoint(bases / generation)
    found = logits(checkpoint)
    assert relative_difference(found, logits_of(wrapped)) < NOISE
    assert relative_difference(found, logits(unchanged)) > 1e-2
    expected = wrapped.merge_and_unload().state_dict()
    for spec in weight_specs(checkpoint.config).values():
        array = spec.to_file(checkpoint.weights[spec.name], "hf")
        np.testing.assert_allclose(array, expected[spec.hf], atol=1e-6)
        if spec.kind == "matrix":
            pieces = [rows for _, rows in checkpoint.weights.table_chunks(spec.name, 4096)]
            assert len(pieces) > 1
            np.testing.assert_allclose(np.concatenate(pieces), array, atol=1e-6)
    assert checkpoint.config == unchanged.config


HEADS = {
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "LoRA on the head": {"target_modules": ["lm_head", "q_proj"]},
    "LoRA on both": {"target_modules": ["lm_head", "embed_tokens"]},
    "copies of both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "a copy of the embedding": {"modules_to_save": ["embed_tokens"]},
    "a copy of the head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize(
    ("options", "tied"),
    [(options, True) for options in HEADS.values()] + [(HEADS["LoRA on both"], False)],
    ids=[*HEADS, "untied"],
)
def test_a_head_is_what_it_was_while_the_adapter_was_trained(options, tied, tmp_path):
    write_tiny_hf(tmp_path / "base", "gemma3", tied=tied)
    wrapped = adapter_of(tiny_hf("gemma3", tied=tied), **options)
    save(wrapped, tmp_path / "adapter")
    checkpoint = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    assert not checkpoint.config.tied_head
    assert [("a separate table" in remark) for remark in checkpoint.remarks] == [True] * tied
    assert relative_difference(logits(checkpoint), logits_of(wrapped)) < NOISE
    whole = np.concatenate([rows for _, rows in table_chunks(checkpoint.weights, "head", 4096)])
    np.testing.assert_array_equal(whole, checkpoint.weights["head"])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_a_head_that_peft_keeps_tied_stays_tied(options, bases, tmp_path):
    wrapped = adapter_of(tiny_hf("gemma3"), ensure_weight_tying=True, **options)
    save(wrapped, tmp_path / "adapter")
    checkpoint = open_checkpoint(tmp_path / "adapter", base=bases / "gemma3")
    assert checkpoint.config.tied_head
    assert relative_difference(logits(checkpoint), logits_of(wrapped)) < NOISE


@pytest.mark.parametrize("target", [["q_proj"], ["q_proj", "embed_tokens"]], ids=str)
def test_a_vocabulary_that_was_resized_comes_with_the_adapter(target, bases, tmp_path):
    model = tiny_hf("gemma3")
    model.resize_token_embeddings(VOCABULARY_SIZE + 4, mean_resizing=False)
    wrapped = adapter_of(model, target_modules=target)
    save(wrapped, tmp_path / "adapter", save_embedding_layers=True)
    checkpoint = open_checkpoint(tmp_path / "adapter", base=bases / "gemma3")
    assert checkpoint.config.vocabulary_size == VOCABULARY_SIZE + 4
    assert checkpoint.config.tied_head == (target == ["q_proj"])
    assert relative_difference(logits(checkpoint), logits_of(wrapped)) < NOISE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_adapter_of_another_type_is_read_as_it_is(dtype, everywhere, bases, tmp_path):
    folder, expected = everywhere
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    found = logits(open_checkpoint(tmp_path / "a", base=bases / "gemma3"))
    assert relative_difference(found, expected) < (NOISE if dtype == torch.float64 else 0.2)


# --- where adapter and base lie ------------------------------------------------------------------


def beside(folder, base, tmp_path):
    """An adapter in its base's folder."""
    shutil.copytree(base, tmp_path / "whole")
    shutil.copytree(folder, tmp_path / "whole", dirs_exist_ok=True)
    return tmp_path / "whole"


def test_an_adapter_beside_its_base_is_merged(everywhere, bases, tmp_path):
    folder, expected = everywhere
    whole = beside(folder, bases / "gemma3", tmp_path)
    checkpoint = open_checkpoint(whole)
    assert relative_difference(logits(checkpoint), expected) < NOISE
    assert "if these weights already contain it" in checkpoint.remarks[0]


def test_an_adapter_alone_is_merged_into_what_it_names(everywhere, bases, tmp_path):
    folder, expected = everywhere
    shutil.copytree(folder, tmp_path / "checkpoint-500")
    edit(tmp_path / "checkpoint-500", base_model_name_or_path=str(bases / "gemma3"))
    (tmp_path / "checkpoint-500" / "config.json").write_text("{}")  # as some trainers leave it
    checkpoint = open_checkpoint(tmp_path / "checkpoint-500")
    assert relative_difference(logits(checkpoint), expected) < NOISE
    assert checkpoint.provenance["name"] == "checkpoint-500"
    assert checkpoint.provenance["file"] == "gemma3 with the adapter checkpoint-500"
    assert checkpoint.tokenizer_model == open_checkpoint(bases / "gemma3").tokenizer_model


def test_a_peft_model_saved_whole_is_merged_if_its_configuration_is_there(bases, tmp_path):
    wrapped = adapter_of(tiny_hf("gemma3"), modules_to_save=["norm"])
    folder = tmp_path / "unmerged"
    shutil.copytree(bases / "gemma3", folder)
    state = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in state
    with pytest.raises(CheckpointError, match=r"adapter_config\.json with its scale"):
        open_checkpoint(folder)
    save(wrapped, tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", folder)
    assert relative_difference(logits(open_checkpoint(folder)), logits_of(wrapped)) < NOISE


def test_a_multimodal_model_takes_an_adapter_by_its_own_names(tmp_path):
    text = tiny_hf("gemma3").config
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
        image_token_index=299,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    wrapped = adapter_of(model)
    save(wrapped, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("vision_tower" in name for name in names)
    assert any("language_model.layers.7" in name for name in names)
    checkpoint = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    assert relative_difference(logits(checkpoint), logits_of(wrapped)) < NOISE


def test_a_weight_that_an_adapter_changes_is_not_on_the_bases_grid(tmp_path):
    import gguf

    from tests import gguf_files

    meta = gguf_files.metadata("gemma3", 2)
    arrays = gguf_files.tensors(meta)
    path = gguf_files.write_gguf(
        tmp_path / "base.gguf", meta, arrays, gguf.GGMLQuantizationType.Q8_0
    )
    config = config_to_hf(open_checkpoint(path).config)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.float32
    )
    save(adapter_of(model, target_modules=["q_proj"]), tmp_path / "adapter")
    weights = open_checkpoint(tmp_path / "adapter", base=path).weights
    assert weights.stored_as("layers.1.attention.key") == "Q8_0"
    kept = weights.grid("layers.1.attention.key")
    np.testing.assert_array_equal(kept.values(), weights["layers.1.attention.key"].T)
    assert weights.stored_as("layers.1.attention.query") is None
    assert weights.grid("layers.1.attention.query") is None


# --- in the model and in a bundle ----------------------------------------------------------------


@pytest.mark.keras
@pytest.mark.backends("torch")  # what is read has no backend
def test_from_preset_and_export_onnx_merge_an_adapter(everywhere, bases, tmp_path):
    from edge_demo.bundle.reader import Bundle
    from edge_demo.engine.runner import Engine
    from export import export_onnx
    from gemma_keras import GemmaCausalLM

    folder, expected = everywhere
    model = GemmaCausalLM.from_preset(folder, base=bases / "gemma3")
    assert relative_difference(model.logits(IDS), expected) < NOISE
    export_onnx(folder, tmp_path / "bundle", "fp32", base=bases / "gemma3", verify=False)
    engine = Engine(Bundle.open(tmp_path / "bundle"), threads=1)
    found = np.concatenate(list(engine.all_logits(IDS[0].tolist())))
    assert relative_difference(found, expected[0]) < NOISE


# --- what is refused -----------------------------------------------------------------------------


def refusal(source, **options):
    with pytest.raises(ModelError) as error:
        weights = open_checkpoint(source, **options).weights
        for name in weights:
            weights[name]
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "a length for each output (DoRA)"),
        ({"lora_bias": True}, "biases"),
        ({"bias": "all"}, "bias='all', which requires biases"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layers used several times"),
        ({"trainable_token_indices": [1, 2]}, "single rows of the embedding"),
        ({"target_parameters": ["x"]}, "single parameters"),
        ({"alora_invocation_tokens": [5]}, "after certain tokens only"),
        ({"kasa_config": {"beta": 1}}, "a feature that this project does not support"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA can be merged"),
        ({"peft_type": None}, "peft_type None"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "changes the base model's weights before training",
        ),
        ({"r": 4}, "gives the rank 4"),
        ({"r": 0}, "the rank 0"),
        ({"r": "3"}, "the rank '3'"),
        ({"lora_alpha": float("nan")}, "the lora_alpha nan"),
        ({"lora_alpha": 10**400}, "the lora_alpha 1000"),
        ({"modules_to_save": 1}, "a list of names as modules_to_save"),
        ({"alpha_pattern": {"(a+)+q_proj": 1}}, "not a supported regular expression"),
        ({"alpha_pattern": {"[": 1}}, "not a supported regular expression"),
        ({"rank_pattern": 5}, "must have an object of up to 5,000 patterns as rank_pattern"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_an_adapter_that_is_no_plain_lora_is_refused_by_name(
    change, said, everywhere, bases, tmp_path
):
    shutil.copytree(everywhere[0], tmp_path / "a")
    edit(tmp_path / "a", **change)
    assert said in refusal(tmp_path / "a", base=bases / "gemma3")


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors_without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {}, "no adapter_model.safetensors with tensors"),
        (tensors_without(f"{Q}.lora_B.weight"), "lacks the matrix lora_B of model.layers.0"),
        (lambda t: t | {f"{Q}.lora_magnitude_vector": torch.ones(3)}, "not part of a plain LoRA"),
        (lambda t: t | {f"{Q}.bias": torch.ones(3)}, "not part of a plain LoRA"),
        (
            lambda t: t | {f"{Q}.lora_A.other.weight": t[f"{Q}.lora_A.weight"].clone(), f"{Q}.lora_B.default.weight": t[f"{Q}.lora_B.weight"].clone()},
            "the adapters default, other in one file",
        ),
        (
            lambda t: {name.replace("layers.0", "layers.9"): value for name, value in t.items()},
            "changes model.layers.9",
        ),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(3, 4)}, "that the adapter was trained on"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(3, 0)}, "that the adapter was trained on"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(3)}, "shapes [3] and [128, 3]"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(3, 96).int()}, "is of type I32"),
        (
            lambda t: t | {f"{Q}.lora_A.weight": torch.full((3, 96), float("nan"))},
            "matrices of model.layers.0.self_attn.q_proj hold values that are not finite",
        ),
        (
            lambda t: t | {"base_model.model.model.embed_tokens.weight": torch.ones(310, 96), "base_model.model.lm_head.weight": torch.ones(305, 96)},
            "shape [310, 96]",
        ),
        (
            lambda t: t | {"base_model.model.lm_head.weight": torch.ones(305, 96)},
            "has a table of 305 tokens",
        ),
    ],
)  # fmt: skip
def test_matrices_that_do_not_fit_are_refused(change, said, everywhere, bases, tmp_path):
    shutil.copytree(everywhere[0], tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    assert said in refusal(tmp_path / "a", base=bases / "gemma3")


def test_an_adapter_for_another_size_is_refused(everywhere, bases):
    assert "that the adapter was trained on" in refusal(everywhere[0], base=bases / "gemma")


def test_an_adapter_without_a_base_says_how_to_give_one(everywhere, tmp_path):
    how = "name the base model (--base SOURCE, or base=...)"
    shutil.copytree(everywhere[0], tmp_path / "a")
    edit(tmp_path / "a", base_model_name_or_path=None)
    assert "does not name its base model; " + how in refusal(tmp_path / "a")
    edit(tmp_path / "a", base_model_name_or_path="/nowhere/at all")
    assert how in refusal(tmp_path / "a")
    edit(tmp_path / "a", base_model_name_or_path=str(tmp_path / "a"))  # itself
    assert "is itself an adapter" in refusal(tmp_path / "a")


def test_a_base_for_what_is_no_adapter_is_refused(bases):
    assert "not an adapter" in refusal(bases / "gemma", base=bases / "gemma3")


@pytest.mark.parametrize("damage", ["cut", "pickle", "pointer", "text"])
def test_a_damaged_adapter_is_told(damage, everywhere, bases, tmp_path):
    shutil.copytree(everywhere[0], tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
        said = "cannot be read as safetensors"
    elif damage == "pickle":
        path.rename(tmp_path / "a" / "adapter_model.bin")
        said = "adapter_model.bin is a pickle"
    elif damage == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n")
        said = "Git LFS pointer"
    else:
        (tmp_path / "a" / "adapter_config.json").write_text("[")
        said = "is not JSON"
    assert said in refusal(tmp_path / "a", base=bases / "gemma3")


# --- GGUF ----------------------------------------------------------------------------------------


def write_gguf_adapter(path, adapter, kind="gemma3", **metadata):
    """A PEFT adapter as llama.cpp's converter writes it."""
    import gguf

    config = json.loads((adapter / "adapter_config.json").read_text())
    names = {
        spec.hf.removesuffix(".weight"): spec.gguf
        for spec in weight_specs(metadata.pop("config")).values()
    }
    writer = gguf.GGUFWriter(path, kind)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", metadata.pop("type", "lora"))
    writer.add_float32("adapter.lora.alpha", metadata.pop("alpha", config["lora_alpha"]))
    for key, value in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, half = name.removeprefix("base_model.model.").rsplit(".lora_", 1)
        array = tensor.numpy()
        if half == "embedding_A":
            array = np.ascontiguousarray(array.T)
        half = half.removesuffix(".weight")[-1].lower()
        writer.add_tensor(f"{names[module]}.lora_{half}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_adapter_is_merged_into_the_base_that_is_given(everywhere, bases, tmp_path):
    folder, expected = everywhere
    config = open_checkpoint(bases / "gemma3").config
    path = write_gguf_adapter(tmp_path / "lora.gguf", folder, config=config)
    assert "name the base model (--base" in refusal(path)
    found = logits(open_checkpoint(path, base=bases / "gemma3"))
    assert relative_difference(found, expected) < NOISE


def test_a_gguf_adapter_of_the_embedding_is_merged(bases, tmp_path):
    wrapped = adapter_of(tiny_hf("gemma3"), target_modules=["embed_tokens", "v_proj"])
    save(wrapped, tmp_path / "a", save_embedding_layers=False)
    config = open_checkpoint(bases / "gemma3").config
    path = write_gguf_adapter(tmp_path / "lora.gguf", tmp_path / "a", config=config)
    found = logits(open_checkpoint(path, base=bases / "gemma3"))
    assert relative_difference(found, logits_of(wrapped)) < NOISE


def test_a_gguf_adapter_that_cannot_be_merged_is_refused(everywhere, bases, tmp_path):
    config = open_checkpoint(bases / "gemma3").config
    for name, change, said in (
        ("a", {"type": "control_vector"}, "of type 'control_vector'"),
        ("b", {"adapter.alora.invocation_tokens": [1, 2]}, "aLoRA"),
        ("c", {"alpha": float("nan")}, "adapter.lora.alpha = nan"),
    ):
        path = write_gguf_adapter(tmp_path / name, everywhere[0], config=config, **change)
        assert said in refusal(path, base=bases / "gemma3")
    path = write_gguf_adapter(tmp_path / "d", everywhere[0], config=config)
    assert "that the adapter was trained on" in refusal(path, base=bases / "gemma")
