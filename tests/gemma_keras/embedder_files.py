"""A small random text embedder, written as sentence-transformers writes EmbeddingGemma.

Three key-value heads for six queries, a window of 6 tokens each way, projections of two widths.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.models import hf_config, randomize, tiny_tokenizer_model

WINDOW = 12  # 6 ahead and 6 back
HIDDEN, WIDE, DIM = 96, 56, 40
MAX_TOKENS = 120
PROMPTS = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
}
_MODULES = ("Transformer", "Pooling", "Dense", "Dense", "Normalize")
FOLDERS = ("", "1_Pooling", "2_Dense", "3_Dense", "4_Normalize")


def tiny_text_model(seed: int = 0, **changes: Any):
    """transformers' `Gemma3TextModel`, bidirectional, in float32 and evaluation mode."""
    import torch
    import transformers

    data = hf_config("gemma3").to_dict() | {
        "sliding_window": WINDOW,
        "use_bidirectional_attention": True,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 4,
        "layer_types": [f"{k}_attention" for k in ("sliding", "sliding", "full", "sliding")],
        "attn_implementation": "eager",
    }
    config = transformers.Gemma3TextConfig(**data | changes)
    model = transformers.Gemma3TextModel(config).to(torch.float32).eval()
    randomize(model, seed)
    return model


def dense_config(in_features: int, out_features: int) -> dict[str, Any]:
    return {
        "in_features": in_features,
        "out_features": out_features,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }


def pooling_config() -> dict[str, Any]:
    modes = ("cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {
        "word_embedding_dimension": HIDDEN,
        "pooling_mode_mean_tokens": True,
        **{f"pooling_mode_{mode}": False for mode in modes},
        "include_prompt": True,
    }


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def write_tiny_embedder(folder: Path, **changes: Any):
    """Write one.

    Args:
        folder: to write to; made if it is not there.
        **changes: of the transformer's configuration.

    Returns:
        transformers' model and the two matrices, float32 `(out, in)`, as they are in the files.
    """
    from safetensors.numpy import save_file

    model = tiny_text_model(**changes)
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model())
    write_json(
        folder / "modules.json",
        [
            {
                "idx": i,
                "name": str(i),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, (kind, path) in enumerate(zip(_MODULES, FOLDERS, strict=True))
        ],
    )
    write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": MAX_TOKENS, "do_lower_case": False},
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    write_json(folder / "1_Pooling" / "config.json", pooling_config())
    random = np.random.default_rng(5)
    matrices = []
    for name, (wide, narrow) in zip(FOLDERS[2:4], ((HIDDEN, WIDE), (WIDE, DIM)), strict=True):
        write_json(folder / name / "config.json", dense_config(wide, narrow))
        matrices.append(random.normal(0, wide**-0.5, (narrow, wide)).astype(np.float32))
        save_file({"linear.weight": matrices[-1]}, folder / name / "model.safetensors")
    return model, tuple(matrices)


def by_torch(reference, texts, prompt="", normalize=True, dim=DIM):
    """Each text on its own: mean, two products, the first numbers, length 1."""
    import sentencepiece
    import torch

    transformer, matrices = reference
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer_model())
    vectors = []
    for text in texts:
        ids = [2, *pieces.encode((prompt + text).strip()), 1]
        with torch.no_grad():
            x = transformer(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
        for matrix in matrices:
            x = torch.from_numpy(matrix) @ x
        x = x[:dim]
        vectors.append(torch.nn.functional.normalize(x, dim=0) if normalize else x)
    return torch.stack(vectors).numpy()
