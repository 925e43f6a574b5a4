"""Lists the keys of a Hugging Face `config.json` that do not affect the forward pass.

Many tools add their own keys to a folder. A key that cannot change the computation is ignored. A
key that can must have Gemma's value. A model with any other key is not loaded, because an ignored
key could change the model's output.

Sources: transformers 4.57 and 5.23 (`PretrainedConfig`, `GenerationConfig`, the Gemma classes), and
what Unsloth, TRL, PEFT, Axolotl, MLX and vLLM are known to write.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

from gemma_keras.errors import ConfigError, listed, quoted

# Names and, with a star, families of names.
_INERT: dict[str, str] = {
    "who made the file and of what": """
        _* architectures auto_map custom_pipelines finetuning_task finetuned_from license model_name
        model_type name_or_path task_specific_params transformers.js_config transformers_version
        trust_remote_code unsloth_* mergekit_* axolotl_*
    """,
    "types, memory and kernels": """
        attn_implementation cache_config cache_implementation chunk_size_feed_forward compile_config
        continuous_batching_config disable_compile dtype experts_implementation
        gradient_checkpointing low_memory max_cache_len prefill_chunk_size torch_dtype torchscript
        use_bfloat16 use_cache use_flash_attention use_flash_attention_2 use_flash_attn use_mtp
    """,
    # The weights themselves show whether they are quantized.
    "how weights are stored": "quantization quantization_config compression_config",
    "what a call returns": """
        keys_to_ignore_at_inference logits_to_keep num_logits_to_keep output_attentions
        output_hidden_states output_logits output_router_logits output_scores return_dict
        return_dict_in_generate tie_last_hidden_states use_return_dict
    """,
    "training": """
        *_dropout *_dropout_prob *_dropout_rate *_pdrop dropout ignore_index initializer_factor
        initializer_range label_smoothing loss_type tf_legacy_loss
    """,
    "labels of a classifier": """
        id2label label2id num_labels problem_type
    """,
    "tokenizer": """
        *_token_id *_token_ids *_token_index add_bos_token add_eos_token bos_token chat_template
        eos_token max_seq_len max_seq_length model_max_length pad_token padding_side prefix
        seq_length tokenizer_class tokenizer_model_max_length tokenizer_padding_side unk_token
    """,
    "choosing the next token": """
        assistant_* bad_words_ids begin_suppress_tokens constraints diversity_penalty do_sample
        dola_layers early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
        epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids generation_config
        guidance_scale is_assistant length_penalty max_length max_matching_ngram_size max_new_tokens
        max_time min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens
        num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences penalty_alpha
        prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty
        sequence_bias speculation_type stop_strings suppress_tokens target_lookbehind temperature
        token_healing top_h top_k top_p typical_p watermarking_config
    """,
    "images, of which only the text's side is read": """
        image_* mm_tokens_per_image vision_*
    """,
}

# Keys of other architectures, and the values with which they have no effect on a Gemma; `null` is
# always one of them.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_out_bias": (False,),
    "bias": (False,),
    "lm_head_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "partial_rotary_factor": (1, 1.0),
    "pretraining_tp": (1,),
}
_CLASSIFIER = re.compile(
    r"\w+For(Sequence|Token|Image)Classification|\w+ForQuestionAnswering|\w+RewardModel"
)

_NAMES = frozenset(name for group in _INERT.values() for name in group.split() if "*" not in name)
_FAMILIES = re.compile(
    "|".join(
        fnmatch.translate(name)
        for group in _INERT.values()
        for name in group.split()
        if "*" in name
    )
)


def is_inert(key: str) -> bool:
    """Whether a key cannot change the computation with any value."""
    return key in _NAMES or _FAMILIES.match(key) is not None


def telling_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a `config.json` that may affect the forward pass.

    Raises:
        ConfigError: a key of another architecture turns on an unsupported feature, or the file
            describes a classifier.
    """
    names = data.get("architectures")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and _CLASSIFIER.fullmatch(name):
            raise ConfigError(
                f"config.json describes a {name}, a classifier; this project reads models "
                "that predict the next token (ForCausalLM, ForConditionalGeneration)"
            )
    for key, allowed in _FIXED.items():
        value = data.get(key)
        # `1 == True` in Python; JSON tells them apart
        if value is not None and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
        ):
            raise ConfigError(
                f"{key}={quoted(value)} is not supported; Gemma's value is "
                f"{allowed[0] if allowed else None!r}"
            )
    return {k: v for k, v in data.items() if k not in _FIXED and not is_inert(k)}


def refuse_unknown(keys: Mapping[str, Any], where: str = "config.json") -> None:
    """Raise an error for keys of `telling_keys` that are not known; null values are allowed.

    Raises:
        ConfigError: an unknown key has a value.
    """
    unknown = sorted(key for key, value in keys.items() if value is not None)
    if unknown:
        raise ConfigError(
            f"{where} has keys this project does not know: {listed(unknown)}; they may "
            "change the computation, so the model is not loaded. If you know that a key "
            "changes nothing, remove it from the file"
        )
