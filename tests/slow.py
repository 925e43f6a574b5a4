"""What only `make test-all` runs, and why: tests that take long for what they add.

Data: for each reason the tests, as `file::test` below `tests/`: beginnings of their names, where `*`
is any text and `[[]` a bracket. A file alone means all of it. A reason with backends counts on these
alone: there the test shows what another backend shows too.
"""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import NamedTuple

OTHERS = ("jax", "tensorflow")


class Slow(NamedTuple):
    """Why tests wait for `make test-all`.

    Attributes:
        why: a sentence.
        tests: beginnings of their names, as `fnmatch` takes them.
        backends: on which; none means wherever they run.
    """

    why: str
    tests: tuple[str, ...]
    backends: tuple[str, ...] = ()


SLOW = (
    Slow("A browser and the real model.", ("edge_demo/server/test_page.py",)),
    Slow(
        "The Keras code is the same on every backend. PyTorch shows what it does; what models compute, "
        "generate and learn is shown on all three.",
        (
            "gemma_keras/test_arguments.py",
            "gemma_keras/test_distribute.py",
            "gemma_keras/test_adapter_files.py",
            "gemma_keras/test_adapters.py",
            "gemma_keras/test_finite.py",
            "gemma_keras/test_fit_rows.py::test_answers_are_learnt",
            "gemma_keras/test_fit_rows.py::test_packed_examples*[[]gemma]",
            "gemma_keras/test_fit_rows.py::test_packed_examples*[[]gemma2]",
            "gemma_keras/test_fit_rows.py::test_texts_are_learnt",
            "gemma_keras/test_fit_rows.py::test_the_loss_is_nats*[[]1-*",
            "gemma_keras/test_fit_rows.py::test_the_loss_is_nats*[[]8-*",
            "gemma_keras/test_gguf_parts.py",
            "gemma_keras/test_goldens.py::test_a_mistake_shows",
            "gemma_keras/test_goldens.py::test_every_output_is_that_of_the_live_peer",
            "gemma_keras/test_hub.py",
            "gemma_keras/test_loading.py",
            "gemma_keras/test_lora.py",
            "gemma_keras/test_models.py::test_bfloat16_errs",
            "gemma_keras/test_models.py::test_call_in_chunks*[[]1-*",
            "gemma_keras/test_models.py::test_call_in_chunks*[[]6-*",
            "gemma_keras/test_models.py::test_call_in_chunks*[[]8-*",
            "gemma_keras/test_models.py::test_call_in_chunks*-gemma]",
            "gemma_keras/test_models.py::test_call_in_chunks*-gemma2]",
            "gemma_keras/test_models.py::test_generate_takes_and_gives_text",
            "gemma_keras/test_models.py::test_generation_ends_a_row",
            "gemma_keras/test_models.py::test_greedy_generation_of_unequal_prompts",
            "gemma_keras/test_models.py::test_top_k_sampling_depends",
            "gemma_keras/test_distil.py::test_a_student_comes",
            "gemma_keras/test_distil.py::test_an_adapter_learns",
            "gemma_keras/test_distil.py::test_the_student_is_what_is_saved",
            "gemma_keras/test_distil.py::test_what_does_not_fit",
            "gemma_keras/test_preferences.py::test_a",
            "gemma_keras/test_preferences.py::test_t",
            "gemma_keras/test_preferences.py::test_what",
            "gemma_keras/test_preferences.py::test_without",
            "gemma_keras/test_quantized.py",
            "gemma_keras/test_resume.py::test_it_is_bit_equal*[[]accumulated",
            "gemma_keras/test_resume.py::test_it_is_bit_equal*[[]full",
            "gemma_keras/test_saved_before.py",
            "gemma_keras/test_step_memory.py",
            "gemma_keras/test_saving.py",
            "gemma_keras/test_text_embedder.py",
            "gemma_keras/test_token_loss.py::test_chunks_give*-by_layer]",
            "gemma_keras/test_token_loss.py::test_mixed_precision",
            "gemma_keras/test_tokenizer.py",
            "gemma_keras/test_training.py::test_a_saved_lora_adapter",
            "gemma_keras/test_training.py::test_weight_source_of_a_lora_model",
            "gemma_keras/test_turns_keras.py",
            "gemma_keras/test_writers_keras.py",
            "gemma_keras/test_generation.py::test_a_model_of_keras_hub_comes_in",
            "gemma_keras/test_generation.py::test_a_stream_is_what*[[]gemma]",
            "gemma_keras/test_generation.py::test_a_stream_is_what*[[]gemma2]",
            "gemma_keras/test_generation.py::test_lora_that_is_enabled_later",
            "gemma_keras/test_generation.py::test_one_beam_is_greedy",
            "gemma_keras/test_generation.py::test_prompts_of_about_the_same_length",
            "gemma_keras/test_generation.py::test_prompts_of_unequal_length*[[]1-*",
            "gemma_keras/test_generation.py::test_prompts_of_unequal_length*[[]14-*",
            "gemma_keras/test_generation.py::test_prompts_of_unequal_length*[[]6-*",
            "gemma_keras/test_generation.py::test_prompts_of_unequal_length*[[]8-*",
            "gemma_keras/test_generation.py::test_prompts_of_unequal_length*-gemma]",
            "gemma_keras/test_generation.py::test_prompts_of_unequal_length*-gemma2]",
            "gemma_keras/test_generation.py::test_rows_end_where_they_end_alone",
            "gemma_keras/test_generation.py::test_samplers_that_leave_no_choice",
            "gemma_keras/test_generation.py::test_scores_are",
            "gemma_keras/test_generation.py::test_what_fit_has_changed_counts",
            "export/test_balance.py",
            "export/test_fused.py",
            "export/test_keep_source.py",
            "export/test_report.py",
            "export/test_rounding.py",
            "export/test_traced.py",
        ),
        OTHERS,
    ),
    Slow(
        "Calibration, a KL budget and an interrupted export take minutes, even of small models.",
        (
            "export/test_rounding.py::test_a_budget_that_cannot_be_met",
            "export/test_tuned.py::test_the_bundle*[[]distilled",
            "export/test_tuned.py::test_the_bundle*[[]full",
            "export/test_tuned.py::test_the_bundle*[[]int4",
            "export/test_tuned.py::test_the_bundle*[[]preferences",
            "export/test_rounding.py::test_an_interrupted_calibration",
            "export/test_rounding.py::test_int4_keeps_its_budget",
            "export/test_rounding.py::test_a_sensitivity_is_the_divergence",
            "export/test_rounding.py::test_candidates_are_the_likeliest",
            "export/test_bad_input.py::test_weights_that_are_not_finite_are_named[[]int8]",
        ),
    ),
    Slow(
        "The real weights take minutes, and so does llama.cpp on files that this project wrote. Small "
        "models with the same architecture show the same. Every test with `sample_bundle` is here too.",
        (
            "gemma_keras/test_adapter_llama_cpp.py",
            "gemma_keras/test_gguf.py::test_tensors_of_the_sample",
            "gemma_keras/test_gguf_writer.py::test_the_sample_written_runs",
            "gemma_keras/test_hf_tokenizer_reader.py::test_the_real_tokenizer_comes_back",
            "gemma_keras/test_sample.py",
            "gemma_keras/test_writers_keras.py::test_llama_cpp_goes_on",
            "export/test_bad_input.py::test_the_sample_cut_short",
            "export/test_sample.py",
        ),
    ),
    Slow(
        "Traces that TensorFlow takes long for, and processes that each start it.",
        (
            "export/test_bidirectional.py::test_each_lowering_refuses",
            "export/test_start_keras.py",
            "export/test_telemetry.py::test_an_export_leaves_an_empty_home",
            "export/test_traced.py::test_a_small_mistake",
            "export/test_traced.py::test_what_varies_from_trace_to_trace",
            "export/test_traced.py::test_export_of_a_keras_model",
            "export/test_traced.py::*-gemma]",
            "export/test_traced.py::*gemma2*",
            "export/test_traced.py::test_gemma_7b_is_a_small_graph",
        ),
    ),
    Slow(
        "Training in other precisions and with checkpoints of gradients, models of KerasHub, and LoRA on "
        "a quantized model make many models; the quick tests train, convert and export some.",
        (
            "export/test_fused.py::test_a_lora_model_is_exported",
            "export/test_fused.py::test_export_of_the_keras_model",
            "export/test_fused.py::test_int8_stays_near",
            "gemma_keras/test_arguments.py::test_filters_choose",
            "gemma_keras/test_keras_hub.py",
            "gemma_keras/test_text_embedder.py::test_training_goes_on",
            "gemma_keras/test_training.py::test_gradient_checkpointing",
            "gemma_keras/test_training.py::test_mixed_precision",
            "gemma_keras/test_distribute.py",
            "gemma_keras/test_finite.py::test_float16_is_right",
            "gemma_keras/test_finite.py::test_a_beam_of_no_numbers",
            "gemma_keras/test_arguments.py::test_a_model_that_has_not_been_run_is_quantized",
            "gemma_keras/test_arguments.py::test_lora_on_a_quantized_model",
        ),
    ),
    Slow(
        "The attention of a single token that bundles for boards have. Gemma 2's shows it quickly.",
        (
            "edge_demo/test_engine.py::*[[]gemma-board",
            "edge_demo/test_engine.py::*[[]gemma3-board",
            "edge_demo/test_batch_decoder.py::*[[]gemma3-board",
        ),
    ),
    Slow(
        "Processes that are killed, go on in many ways, or run until their memory is counted; two that "
        "train one model.",
        (
            "gemma_keras/test_processes.py::test_two_processes",
            "export/test_bad_input.py::test_an_interrupted_export",
            "export/test_bad_input.py::test_what_a_killed_export_leaves",
            "gemma_keras/test_loading.py::test_a_table_is_never_twice_in_memory",
            "edge_demo/test_batch.py::test_a_run_goes_on_after_whole_lines",
            "edge_demo/test_batch.py::test_results_of_something_else",
            "edge_demo/test_batch.py::test_whatever_kills_it",
        ),
    ),
    Slow(
        "Thousands of sampled tokens, counted; a few show that the settings are heeded.",
        (
            "edge_demo/test_sampling.py::test_picks_are_as_frequent",
            "edge_demo/test_speculate.py::test_two_sampled_tokens",
            "gemma_keras/test_turns_keras.py::test_ids_without_a_piece",
        ),
    ),
    Slow(
        "Thousands of damaged files; each kind of damage has a test of its own.",
        (
            "edge_demo/test_manifest.py::test_any_change_of_the_manifest",
            "edge_demo/test_hostile_values.py",
            "edge_demo/test_prompt_cache_option.py::test_what_is_no_prompt_cache",
            "export/test_bad_input.py::test_a_gguf_that_is_cut_short",
        ),
    ),
    Slow(
        "All published sizes; small models show the same of each architecture.",
        (
            "gemma_keras/test_parameter_counts.py::test_the_keras_model_of_every_size",
            "test_walk.py",
        ),
    ),
    Slow(
        "PyTorch's recorded graph, counted call by call; what it computes is tested by value.",
        ("gemma_keras/test_torch_graph.py",),
    ),
    Slow(
        "Emulated boards; the first time their software is fetched.",
        ("test_count_arm64.py::test_a_token_of_a_small_model",),
    ),
    Slow(
        "Guides, examples and notebooks start several Keras processes.",
        (
            "test_docs.py::test_the_commands_of_a_guide",
            "test_examples.py",
            "test_notebooks.py::test_a_notebook_runs",
        ),
    ),
)


def is_slow(nodeid: str, backend: str, fixtures: Collection[str] = ()) -> bool:
    """Whether a test is one of them.

    Args:
        nodeid: pytest's name of it.
        backend: that Keras runs on here.
        fixtures: that it uses.
    """
    name = nodeid.removeprefix("tests/")
    return "sample_bundle" in fixtures or any(
        fnmatchcase(name, f"{test}*") and (not slow.backends or backend in slow.backends)
        for slow in SLOW
        for test in slow.tests
    )
