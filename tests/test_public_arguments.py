"""Every argument of what the packages offer changes something, and a test shows it.

The table names that test for each argument. It is complete in both directions: an argument without
an entry fails, and so does an entry whose test, or whose argument, is no more.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
K, E = "gemma_keras/test_", "export/test_"

_FIT = {
    "x": f"{K}training.py::test_fit_on_strings_lowers_the_loss",
    "y": f"{K}arguments.py::test_a_folder_without_a_tokenizer_is_told_and_works_on_token_ids",
    "batch_size": f"{K}finite.py::test_a_loss_that_is_not_finite_is_told_once",
    "sample_weight": f"{K}arguments.py::test_what_fit_is_given_counts",
    "validation_data": f"{K}arguments.py::test_what_fit_is_given_counts",
    "validation_split": f"{K}arguments.py::test_what_fit_is_given_counts",
    "callbacks": f"{K}finite.py::test_a_loss_that_is_not_finite_is_told_once",
}
_QUANTIZE = {
    "mode": f"{K}arguments.py::test_a_model_that_has_not_been_run_is_quantized",
    "config": f"{K}quantized.py::test_a_model_calibrated_by_keras_is_kept",
    "filters": f"{K}arguments.py::test_filters_choose_the_layers_that_are_quantized",
}
_FORCE = f"{K}training.py::test_gradient_checkpointing_changes_no_loss_and_no_gradient"
_SCALED = f"{K}lora.py::test_the_scaled_product_is_added"
_SWITCHED = f"{K}lora.py::test_adapters_are_switched_without_loading"
_EVALUATE = f"{K}fit_rows.py::test_the_loss_is_nats_per_token_that_counts_whatever_the_batches"
_ARRAYS = f"{K}fit_rows.py::test_texts_are_learnt_as_keras_hub_packs_them"
_COMPILE_CONFIG = {"config": f"{K}saving.py::test_training_goes_on_after_load_model"}
_PRESET = f"{K}arguments.py::test_every_argument_counts_for_a_folder_of_save_to_preset"
_RANDOM = f"{K}arguments.py::test_without_load_weights_they_are_random"
_CONFIG = f"{K}config.py::test_"
_SIZES = f"{K}models.py::test_logits_are_those_of_transformers"
_CACHE = f"{K}models.py::test_call_in_chunks_over_a_cache_equals_the_whole_call"
_PREFILL = f"{K}generation.py::test_prompts_of_unequal_length_then_tokens_equal_the_whole_call"
_SCORES = f"{K}generation.py::test_scores_are_the_models_logits_and_their_losses"
_ROOM = f"{K}arguments.py::test_a_prompt_is_never_cut"
_STOPS = f"{K}arguments.py::test_strip_prompt_and_stops"
_VECTORS = f"{K}text_embedder.py::test_vectors_are_those_of_plain_torch"
_EMBEDDER = f"{K}text_embedder.py::test_what_a_folder_is_loaded_with_counts"
_BAD = f"{E}bad_input.py::test_"

_RESUMED = {
    "checkpoint_dir": f"{K}resume.py::test_it_is_bit_equal_wherever_it_was_interrupted",
    "checkpoint_every": f"{K}resume.py::test_it_says_where_it_can_go_on",
}
_DISTILLED = f"{K}distil.py::test_the_divergence_is_what_it_is_by_hand"
_PREFERRED = f"{K}preferences.py::test_the_loss_is_what_it_is_by_hand"
_REFUSED = f"{K}distil.py::test_what_does_not_fit_is_refused"
_DPO_LONG = f"{K}preferences.py::test_a_long_answer_is_cut_and_the_prompt_stays"


def _tuner(
    name: str, packed: str, long: str, by_hand: str, learns: str
) -> dict[str, dict[str, str]]:
    """What a way to teach has of the class that all of them have in common."""
    options = {"pack": packed, "on_too_long": long}
    return {
        f"{name}.call": {"inputs": by_hand, "training": learns, "mask": by_hand},
        f"{name}.compute_loss": dict.fromkeys(
            ("x", "y", "y_pred", "sample_weight", "training"), by_hand
        ),
        f"{name}.compile": {"optimizer": learns, "loss": _REFUSED, "weighted_metrics": _REFUSED},
        f"{name}.make_train_function": {"force": _FORCE},
        f"{name}.zero_grad": {"set_to_none": f"{K}distil.py::test_each_step_is_of_its_batch_alone"},
        f"{name}.fit": _FIT | options | _RESUMED,
        f"{name}.evaluate": options
        | {"x": by_hand, "batch_size": by_hand, "y": _ARRAYS, "sample_weight": _ARRAYS},
        f"{name}.compile_from_config": _COMPILE_CONFIG,
    }


SHOWN: dict[str, dict[str, str]] = {
    "Distiller.__init__": {
        "student": _DISTILLED,
        "teacher": f"{K}distil.py::test_targets_on_disk_are_the_teacher_s_likeliest",
        "divergence": _DISTILLED,
        "temperature": _DISTILLED,
        "text_weight": _DISTILLED,
    },
    **_tuner(
        "Distiller",
        _DISTILLED,
        f"{K}distil.py::test_long_rows_are_cut_in_targets_as_in_training",
        _DISTILLED,
        f"{K}distil.py::test_a_student_comes_nearer",
    ),
    "PreferenceTuner.__init__": {
        "task": _PREFERRED,
        "form": _PREFERRED,
        "beta": _PREFERRED,
        "reference": (
            f"{K}preferences.py::test_without_an_adapter_the_reference_is_the_model_before_training"
        ),
    },
    **_tuner(
        "PreferenceTuner",
        f"{K}preferences.py::test_what_does_not_fit_is_refused",
        _DPO_LONG,
        _PREFERRED,
        f"{K}preferences.py::test_the_margin_grows",
    ),
    "write_targets": {
        "path": _REFUSED,
        "teacher": f"{K}distil.py::test_a_bundle_teaches_as_the_model_does",
        "student": _REFUSED,
        "rows": _REFUSED,
        "top": f"{K}distil.py::test_targets_on_disk_are_the_teacher_s_likeliest",
        "temperature": f"{K}distil.py::test_targets_on_disk_are_the_teacher_s_likeliest",
        "on_too_long": f"{K}distil.py::test_long_rows_are_cut_in_targets_as_in_training",
        "overwrite": f"{K}distil.py::test_targets_are_replaced_when_it_is_said",
        "verbose": f"{K}distil.py::test_targets_are_replaced_when_it_is_said",
    },
    "GemmaBackbone.__init__": {
        "config": _SIZES,
        "dtype": f"{K}loading.py::test_a_model_is_made_of_the_weights_in_its_dtype",
        "kernel_initializer": f"{K}loading.py::test_a_model_made_of_weights_is_like_one_that_is_not",
        "gradient_checkpointing": (
            f"{K}training.py::test_gradient_checkpointing_computes_every_block_again"
        ),
    },
    "GemmaBackbone.enable_lora": dict.fromkeys(
        ("rank", "target_layer_names"),
        f"{K}generation.py::test_the_same_lora_again_changes_nothing_and_another_is_refused",
    ),
    "GemmaBackbone.embed": {"token_ids": f"{K}finite.py::hidden_and_logits"},
    "GemmaBackbone.empty_cache": {"batch_size": _CACHE, "capacity": _CACHE},
    "GemmaBackbone.prefill": {
        "token_ids": _PREFILL,
        "lengths": _PREFILL,
        "capacity": f"{K}generation.py::test_layers_with_a_window_keep_no_more_than_it",
    },
    "GemmaBackbone.call_with_cache": {
        "token_ids": _CACHE,
        "cache": _CACHE,
        "start": f"{K}models.py::test_rows_of_a_batch_may_stand_at_different_positions",
    },
    "GemmaBackbone.variable": {"name": f"{K}finite.py::folders"},
    "GemmaBackbone.load_weight_source": {
        "weights": f"{K}loading.py::test_weights_are_assigned_from_any_source"
    },
    "GemmaCausalLM.__init__": {
        "backbone": f"{K}generation.py::with_turns",
        "preprocessor": f"{K}generation.py::with_turns",
        "instruction_tuned": f"{K}generation.py::test_a_tuned_model_stops_where_it_ends_its_turn",
        "provenance": _PRESET,
        "stop_token_ids": f"{K}turns_keras.py::test_it_keeps_what_it_is_through_every_file",
        "turns": f"{K}turns_keras.py::test_it_keeps_what_it_is_through_every_file",
        "chat_template": f"{K}turns_keras.py::test_it_keeps_what_it_is_through_every_file",
    },
    "GemmaCausalLM.compile": {
        "optimizer": f"{K}saving.py::test_training_goes_on_after_load_model",
        "loss": f"{K}training.py::test_the_loss_counts_every_real_token_and_no_padding",
        "weighted_metrics": f"{K}arguments.py::test_what_fit_is_given_counts",
        "sampler": f"{K}models.py::test_top_k_sampling_depends_on_its_seed_alone",
    },
    "GemmaCausalLM.make_train_function": {"force": _FORCE},
    "GemmaCausalLM.from_preset": {
        "preset": _PRESET,
        "load_weights": _RANDOM,
        "dtype": _PRESET,
        "sequence_length": _PRESET,
        "base": f"{K}adapters.py::test_from_preset_and_export_onnx_merge_an_adapter",
        "instruction_tuned": f"{K}gguf_parts.py::test_from_preset_is_told_whether_a_gguf_is_tuned",
        "special_tokens_in_strings": f"{K}turns_keras.py::test_marks_in_strings_become_tokens_where_asked_and_after_saving",
    },
    "GemmaCausalLM.from_keras_hub": dict.fromkeys(
        ("model", "instruction_tuned", "dtype", "sequence_length"),
        f"{K}arguments.py::test_a_live_model_of_keras_hub_is_what_is_said_of_it",
    ),
    "GemmaCausalLM.to_keras_hub": {
        "dtype": f"{K}arguments.py::test_a_live_model_of_keras_hub_is_what_is_said_of_it"
    },
    "GemmaCausalLM.from_checkpoint": {
        "checkpoint": f"{E}traced.py::test_export_of_a_keras_model_on_any_backend",
        "load_weights": _RANDOM,
        "dtype": f"{K}models.py::test_bfloat16_errs_no_more_than_transformers_in_bfloat16",
        "sequence_length": _ROOM,
        "gradient_checkpointing": (
            f"{K}training.py::test_gradient_checkpointing_computes_every_block_again"
        ),
        "special_tokens_in_strings": f"{K}turns_keras.py::test_marks_in_strings_become_tokens_where_asked_and_after_saving",
    },
    "GemmaCausalLM.get_quantization_layer_structure": {
        "mode": f"{K}quantized.py::test_calibration_starts_from_what_the_first_block_takes"
    },
    "GemmaCausalLM.logits": {"token_ids": _SIZES},
    "GemmaCausalLM.generate": {
        "inputs": _ROOM,
        "max_length": _ROOM,
        "stop_token_ids": _STOPS,
        "strip_prompt": _STOPS,
    },
    "GemmaCausalLM.stream": {
        "prompt": f"{K}generation.py::test_a_stream_is_what_generate_returns",
        "max_length": f"{K}generation.py::test_a_prompt_that_leaves_no_room_is_told_with_both_counts",
        "stop_token_ids": (
            f"{K}generation.py::test_a_stream_ends_before_its_stop_token_and_at_the_length"
        ),
    },
    "GemmaCausalLM.chat": dict.fromkeys(
        ("messages", "max_length", "stream"),
        f"{K}generation.py::test_chat_answers_what_the_template_asks",
    ),
    "GemmaCausalLM.score": dict.fromkeys(
        ("token_ids", "padding_mask", "scoring_mode", "layer_intercept_fn", "target_ids"), _SCORES
    ),
    "GemmaCausalLM.export_to_transformers": {
        "path": f"{K}writers_keras.py::test_a_live_model_is_written_with_its_lora_merged"
    },
    "GemmaCausalLM.export": {
        "filepath": f"{E}fused.py::test_export_of_the_keras_model_writes_the_same_weights",
        "format": f"{E}fused.py::test_another_format_is_left_to_keras",
    },
    "GemmaCausalLM.fit": _FIT
    | {
        "pack": f"{K}fit_rows.py::test_packed_examples_give_loss_and_gradients_of_each_alone",
        "on_too_long": f"{K}fit_rows.py::test_what_was_cut_is_shown_before_training",
    }
    | _RESUMED,
    "GemmaCausalLM.evaluate": {
        "x": _EVALUATE,
        "batch_size": _EVALUATE,
        "pack": _EVALUATE,
        "y": _ARRAYS,
        "sample_weight": _ARRAYS,
        "on_too_long": f"{K}fit_rows.py::test_evaluate_is_told_what_becomes_of_long_rows",
    },
    "GemmaCausalLM.call": dict.fromkeys(
        ("inputs", "training", "mask"), f"{K}fit_rows.py::test_a_call_gives_logits_also_in_training"
    ),
    "GemmaCausalLM.compute_loss": dict.fromkeys(
        ("x", "y", "y_pred", "sample_weight", "training"),
        f"{K}fit_rows.py::test_the_loss_can_be_computed_outside_of_fit",
    ),
    "GemmaCausalLM.enable_lora": {
        "rank": _SCALED,
        "alpha": _SCALED,
        "targets": _SCALED,
        "rslora": _SCALED,
        "dropout": f"{K}lora.py::test_dropout_is_of_training_alone_and_leaves_the_mean",
        "name": _SWITCHED,
    },
    "GemmaCausalLM.set_adapter": {"name": _SWITCHED},
    "GemmaCausalLM.delete_adapter": {"name": _SWITCHED},
    "GemmaCausalLM.save_adapter": {
        "path": f"{K}adapter_files.py::test_peft_loads_what_is_saved",
        "name": f"{K}adapter_files.py::test_each_adapter_is_saved_by_its_name",
        "format": f"{K}adapter_files.py::test_a_gguf_adapter_comes_back",
        "dtype": f"{K}adapter_files.py::test_every_generation_goes_to_peft_and_back",
        "overwrite": f"{K}adapter_files.py::test_an_adapter_replaces_an_adapter_alone",
    },
    "GemmaCausalLM.load_adapter": {
        "path": f"{K}adapter_files.py::test_peft_loads_what_is_saved",
        "name": f"{K}adapter_files.py::test_a_gguf_adapter_comes_back",
        "check_base": f"{K}adapter_files.py::test_an_adapter_for_another_size_or_base_is_refused",
    },
    "GemmaCausalLM.compile_from_config": _COMPILE_CONFIG,
    "GemmaCausalLM.quantize": _QUANTIZE,
    "GemmaCausalLMPreprocessor.without_bos": {
        "x": f"{K}fit_rows.py::test_control_tokens_in_strings_are_parsed_as_the_tokenizer_does"
    },
    "GemmaCausalLMPreprocessor.generate_preprocess": {"x": _ROOM, "sequence_length": _ROOM},
    "GemmaTextEmbedder.__init__": {
        "backbone": _VECTORS,
        "preprocessor": f"{K}text_embedder.py::test_without_a_preprocessor_there_are_no_texts",
        "projection_dims": f"{K}text_embedder.py::test_a_vector_is_cut_before_it_is_normalized",
        "normalize": f"{K}text_embedder.py::test_the_model_itself_gives_the_vectors_of_a_padded_batch",
        "prompts": f"{K}text_embedder.py::test_prompts_are_put_before_the_text",
        "default_prompt_name": (
            f"{K}text_embedder.py::test_a_default_prompt_is_used_unless_another_is_asked_for"
        ),
    },
    "GemmaTextEmbedder.export": {
        "filepath": f"{K}embedder_export.py::test_a_live_model_is_exported",
        "format": f"{K}embedder_export.py::test_what_cannot_be_exported_is_said",
    },
    "GemmaTextEmbedder.from_preset": dict.fromkeys(
        ("preset", "load_weights", "dtype", "sequence_length"), _EMBEDDER
    ),
    "GemmaTextEmbedder.from_checkpoint": {
        "checkpoint": _VECTORS,
        "load_weights": _EMBEDDER,
        "dtype": _VECTORS,
        "sequence_length": f"{K}text_embedder.py::test_a_text_that_is_too_long_is_cut_with_a_warning",
    },
    "GemmaTextEmbedder.encode": {
        "texts": _VECTORS,
        "prompt": f"{K}text_embedder.py::test_white_space_around_a_text_is_left_out_and_control_"
        "tokens_are_text",
        "prompt_name": f"{K}text_embedder.py::test_prompts_are_put_before_the_text",
        "normalize": f"{K}text_embedder.py::test_a_vector_is_cut_before_it_is_normalized",
        "truncate_dim": f"{K}text_embedder.py::test_a_vector_is_cut_before_it_is_normalized",
        "batch_size": f"{K}text_embedder.py::test_what_a_text_is_batched_with_does_not_change_its_vector",
    },
    "GemmaTextEmbedder.make_train_function": {"force": _FORCE},
    "GemmaTextEmbedder.fit": _FIT,
    "GemmaTextEmbedder.compile_from_config": _COMPILE_CONFIG,
    "GemmaTextEmbedder.quantize": _QUANTIZE,
    "GemmaTokenizer.__init__": {
        "proto": f"{K}generation.py::test_a_tuned_model_stops_where_it_ends_its_turn",
        "special_tokens_in_strings": f"{K}turns_keras.py::test_marks_in_strings_become_tokens_where_asked_and_after_saving",
    },
    "GemmaTokenizer.set_proto": {
        "proto": f"{K}turns_keras.py::test_it_keeps_what_it_is_through_every_file"
    },
    "GemmaTokenizer.tokenize": {
        "inputs": f"{K}turns_keras.py::test_marks_in_strings_become_tokens_where_asked_and_after_saving"
    },
    "GemmaTokenizer.encode": {"text": f"{K}turns_keras.py::test_it_is_told_wherever_texts_go_in"},
    "GemmaTokenizer.decode": {"ids": f"{K}turns_keras.py::test_ids_are_decoded_as_detokenize_does"},
    "open_checkpoint": {
        "source": f"{E}run_in_chunks.py::config",
        "base": f"{K}adapters.py::test_an_adapter_alone_is_merged_into_what_it_names",
        "instruction_tuned": f"{K}gguf_parts.py::test_from_preset_is_told_whether_a_gguf_is_tuned",
    },
    "named_config": {
        "name": f"{K}config.py::test_an_unknown_size_is_refused_with_those_that_are_known"
    },
    "export_onnx": {
        "source": f"{E}bad_input.py::test_a_missing_source",
        "out": f"{E}fused.py::test_export_of_the_keras_model_writes_the_same_weights",
        "recipe": f"{E}fused.py::test_graph_keeps_its_contract",
        "options": f"{E}options.py::test_fields_stand_in_place_of_those_of_options",
        "on_progress": f"{E}report.py::test_a_text_that_cannot_be_used_is_refused",
    },
    "ExportOptions.__init__": {
        "adapters": f"{E}beside.py::test_the_bundle_is_the_base_s_and_each_adapter_is_beside_it",
        "base": f"{K}adapters.py::test_from_preset_and_export_onnx_merge_an_adapter",
        "instruction_tuned": (
            f"{K}gguf_parts.py::test_export_onnx_says_what_it_passed_over_and_is_told_what_it_cannot_know"
        ),
        "kl_budget": f"{E}rounding.py::test_int4_keeps_its_budget_and_says_what_it_chose",
        "calibration": f"{E}rounding.py::test_int4_keeps_its_budget_and_says_what_it_chose",
        "plan": f"{E}rounding.py::test_a_plan_of_ones_own_is_followed",
        "target": f"{E}by_rows.py::test_the_engine_is_near_the_keras_model",
        "lowering": f"{E}traced.py::test_the_engine_says_the_same_with_either_bundle",
        "kv_cache_dtype": f"{E}bad_input.py::test_a_kv_cache_of_another_dtype_names_those_there_are",
        "max_context": f"{E}bad_input.py::test_a_context_the_model_does_not_have",
        "overwrite": f"{E}bad_input.py::test_overwrite_replaces_a_bundle",
        "verify": f"{E}traced.py::test_export_of_a_keras_model_on_any_backend",
        "report": f"{E}report.py::test_the_card_shows_it",
    },
}
# Data, and what reads and writes data: their fields are the model's, and their tests compare it.
DATA = ("GemmaConfig", "LayerSpec", "ExportResult")


def offered() -> dict[str, list[str]]:
    """Public functions and methods of the packages to the names of their arguments."""
    found = {}
    for module in (importlib.import_module(name) for name in ("gemma_keras", "export")):
        for name in module.__all__:
            value = getattr(module, name)
            if name in DATA:
                continue
            functions = {name: value} if inspect.isfunction(value) else own_methods(name, value)
            for label, function in functions.items():
                parameters = inspect.signature(function).parameters.values()
                found[label] = [
                    p.name
                    for p in parameters
                    if p.name not in ("self", "cls")
                    and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
                ]
    return {label: names for label, names in found.items() if names}


def own_methods(name: str, kind: type):
    found = {}
    for base in kind.__mro__:
        if not base.__module__.startswith(("gemma_keras", "export")):
            continue
        for attribute, value in vars(base).items():
            function = value.__func__ if isinstance(value, classmethod) else value
            public = attribute == "__init__" or not attribute.startswith("_")
            if public and inspect.isfunction(function):
                found.setdefault(f"{name}.{attribute}", function)
    return found


def test_every_public_argument_has_a_test():
    table = {label: sorted(entries) for label, entries in SHOWN.items()}
    assert {label: sorted(names) for label, names in offered().items()} == table


@functools.cache
def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("label", SHOWN)
def test_the_tests_that_the_table_names_are_there(label):
    for argument, test in SHOWN[label].items():
        file, name = test.split("::")
        assert name in functions_of(TESTS / file), f"{label}({argument}): {test} is not there"
