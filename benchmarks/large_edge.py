"""A model of a large shape beside llama.cpp's Q4_0 of the same shape: prefill, decode, memory.

    python benchmarks/large_edge.py gemma_2b build/large/gemma_2b-int4 --folder build/large

The bundle is one of `large.py`; the GGUF file has random Q4_0 blocks, the table included, and is
made where it is missing. Both take turns, each in a process of its own. The words of random weights
mean nothing, so only time and memory are compared.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import gguf
import numpy as np
from edge import shares, table
from large import write_checkpoint
from pareto import measure_speed
from peers import Contender
from sentencepiece import SentencePieceProcessor

from edge_demo.cli.terminal import Progress
from edge_demo.device import huge_pages
from gemma_keras import GemmaConfig
from gemma_keras.checkpoints.names import weight_specs

_BLOCK = 32
_SCALE = 0.003
_NORMAL, _CONTROL, _BYTE = 1, 3, 6


def write_gguf(config: GemmaConfig, tokenizer: Path, path: Path) -> Path:
    """A Gemma of random Q4_0 blocks; kept if it is there."""
    if path.exists():
        return path
    partial = path.with_suffix(".part")
    writer = gguf.GGUFWriter(partial, "gemma")
    layer = config.layers[0]
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_dim)
    writer.add_block_count(len(config.layers))
    writer.add_feed_forward_length(layer.ffw_dim)
    writer.add_head_count(layer.num_heads)
    writer.add_head_count_kv(layer.num_kv_heads)
    writer.add_key_length(layer.head_dim)
    writer.add_value_length(layer.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    pieces = SentencePieceProcessor(model_file=str(tokenizer))
    count = config.vocabulary_size
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i) for i in range(count)])
    writer.add_token_scores([pieces.get_score(i) for i in range(count)])
    writer.add_token_types(
        [
            _CONTROL if pieces.is_control(i) else _BYTE if pieces.is_byte(i) else _NORMAL
            for i in range(count)
        ]
    )
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    rng = np.random.default_rng(0)
    specs = list(weight_specs(config).values())
    told = Progress("tensor")
    for number, spec in enumerate(specs):
        if spec.kind == "norm":
            writer.add_tensor(spec.gguf, np.ones(spec.shape, np.float32))
        else:
            writer.add_tensor(
                spec.gguf,
                _random_q4_0(spec.file_shape, rng),
                raw_dtype=gguf.GGMLQuantizationType.Q4_0,
            )
        told(number + 1, len(specs))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def _random_q4_0(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Rows of blocks: a float16 scale, and 32 numbers of 4 bits each."""
    blocks = np.empty((shape[0], shape[1] // _BLOCK, 2 + _BLOCK // 2), np.uint8)
    blocks[..., :2] = np.full(1, _SCALE, np.float16).view(np.uint8)
    blocks[..., 2:] = rng.integers(0, 256, (*blocks.shape[:2], _BLOCK // 2), np.uint8)
    return blocks.reshape(shape[0], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", help="such as gemma_2b")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="where large.py wrote")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=32)
    arguments = parser.parse_args()

    os.environ.setdefault(huge_pages.VARIABLE, huge_pages.SETTING)
    source = arguments.folder / arguments.size
    config = write_checkpoint(arguments.size, source)
    peer = arguments.folder / f"{arguments.size}-q4_0.gguf"
    write_gguf(config, source / "tokenizer.model", peer)
    contenders = [
        Contender(arguments.bundle.name, "bundle", arguments.bundle),
        Contender("llama.cpp Q4_0", "llama.cpp", peer),
    ]
    counts = arguments.prompt_tokens, arguments.decode_tokens, 1
    speeds = measure_speed(contenders, arguments.threads, arguments.rounds, *counts)
    print(table(contenders, speeds))
    print(f"\n{shares(contenders, speeds, arguments.threads)}")


if __name__ == "__main__":
    main()
