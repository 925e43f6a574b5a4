"""Small random Gemmas of each generation, written as transformers writes them.

They are made so that a mistake shows: key-value heads neither one nor all, heads times head_dim
not the hidden width, a window shorter than half the text, more layers than the window pattern,
norm scales and soft caps that matter, a norm epsilon that is nobody's default.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY_SIZE = 300
WINDOW = 7
GENERATIONS = ("gemma", "gemma2", "gemma3")

_SENTENCES = (
    "The gardener waters the young trees before the sun is high.",
    "A boat went down the river, and nobody on the bank waved to it.",
    "Seven small stones lay on the table; she counted them twice.",
    "When the rain stopped, the children ran out to look for snails.",
    "Bread rises slowly in a cold kitchen, so the baker began at four.",
    "He wrote the number 1984 on the door and went back to sleep.",
    "Is the shop still open? It closes at five on Fridays.",
    "The old bridge was built of oak, the new one is built of steel.",
)
TEXT = "\n".join(_SENTENCES)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,
    "attn_implementation": "eager",
}


def hf_config(generation: str, tied: bool = True):
    """The transformers configuration of the small model of a generation."""
    import transformers

    common = _COMMON | {"tie_word_embeddings": tied}
    if generation == "gemma":
        return transformers.GemmaConfig(
            num_hidden_layers=3,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            **common,
        )
    if generation == "gemma2":
        return transformers.Gemma2Config(
            num_hidden_layers=5,
            query_pre_attn_scalar=20,
            sliding_window=WINDOW,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=6.0,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            **common,
        )
    if generation == "gemma3":
        return transformers.Gemma3TextConfig(
            num_hidden_layers=8,
            query_pre_attn_scalar=20,
            sliding_window=WINDOW,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            **common,
        )
    raise ValueError(f"generation must be one of {GENERATIONS}, not {generation!r}")


def shallow(generation: str) -> dict[str, Any]:
    """Changes that leave two layers, one of each kind: for tests of what does not depend on depth,
    since a compiler takes its time for each layer."""
    if generation == "gemma":
        return {"num_hidden_layers": 2}
    return {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


def tiny_hf(generation: str, seed: int = 0, tied: bool = True, **changes: Any):
    """A small random transformers model in float32, in evaluation mode."""
    import torch
    import transformers

    config = hf_config(generation, tied)
    config.update(changes)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    randomize(model, seed)
    return model


def randomize(model, seed: int) -> None:
    """Give a transformers model weights that hide nothing."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, deviation = weight_statistics(name, parameter.shape)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(mean + deviation * noise)
    return model


def weight_statistics(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a random weight that hides nothing, by its name in a file of
    transformers' and its shape there."""
    if len(shape) == 1:  # transformers starts norms at 0, which hides them
        return (8.0 if name == "model.norm.weight" else 0.0), 0.4
    if "embed_tokens" in name or "lm_head" in name:
        # Small, so that the layers decide and a tied head does not repeat its input.
        return 0.0, 0.05
    # Queries and keys large enough that attention is far from uniform.
    gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
    return 0.0, gain / shape[1] ** 0.5


def without(data, key):
    """A dictionary without one of its keys."""
    return {k: v for k, v in data.items() if k != key}


def random_ids(batch_size=3, length=24, seed=1):
    """Token ids that are no control tokens, int32 `(batch_size, length)`."""
    ids = np.random.default_rng(seed).integers(4, VOCABULARY_SIZE, (batch_size, length))
    return ids.astype("int32")


def relative_difference(found, expected):
    """Greatest difference in units of the expected values' standard deviation."""
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / expected.std()


# Chat templates as tuned models bring them.
GEMMA_JINJA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set before = messages[0]['content'].strip() + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set before = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% set who = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + who + '\n' + (before if loop.first else '') }}"
    "{{ m['content'].strip() + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML_JINJA = (
    "{% for m in messages %}"
    "{{ bos_token if loop.first }}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer_model(vocabulary_size: int = VOCABULARY_SIZE) -> bytes:
    """A SentencePiece model with Gemma's conventions; up to 480 pieces."""
    return train_tokenizer(_SENTENCES, vocabulary_size, split_digits=True)


def train_tokenizer(sentences: Iterable[str], vocabulary_size: int, **more: Any) -> bytes:
    """A SentencePiece model with Gemma's conventions.

    Args:
        sentences: to learn from.
        vocabulary_size: in pieces.
        more: settings of SentencePiece's trainer.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary_size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
        **more,
    )
    return model.getvalue()


def chat_tokenizer_model(
    start: str = "<start_of_turn>", end: str = "<end_of_turn>", turn_type: int = 3
) -> bytes:
    """The small tokenizer, whose last pieces become the tokens of turns and two spaces.

    Args:
        start: opens a turn.
        end: closes it.
        turn_type: SentencePiece's type of both, by default control.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(tiny_tokenizer_model())
    kinds = proto.ModelProto.SentencePiece
    for index, (piece, kind) in enumerate(
        (
            (start, turn_type),
            (end, turn_type),
            ("\u2581\u2581", kinds.USER_DEFINED),
        ),
        start=-3,
    ):
        entry = model.pieces[index]
        entry.piece, entry.type = piece, kind
    return model.SerializeToString()


def write_tiny_chat(
    folder: Path, generation: str = "gemma3", seed: int = 0, **changes: Any
) -> Path:
    """Write a shallow random model whose tokenizer has the tokens of turns; see `write_tiny_hf`.

    Returns:
        The folder.
    """
    write_tiny_hf(folder, generation, seed, **(shallow(generation) | changes))
    (folder / "tokenizer.model").write_bytes(chat_tokenizer_model())
    return folder


def write_tiny_hf(folder: Path, generation: str, seed: int = 0, tied: bool = True, **changes: Any):
    """Write a small random model as a Hugging Face folder, tokenizer included.

    Args:
        folder: to write to; made if it is not there.
        generation: one of `GENERATIONS`.
        seed: of the weights.
        tied: whether the head is the embedding table.
        changes: to the configuration.

    Returns:
        The transformers model that was written.
    """
    model = tiny_hf(generation, seed, tied, **changes)
    model.save_pretrained(folder)
    (Path(folder) / "tokenizer.model").write_bytes(tiny_tokenizer_model())
    return model
