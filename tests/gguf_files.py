"""Small GGUF files for tests: valid ones by the `gguf` package, any others byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

F32 = gguf.GGMLQuantizationType.F32
CONTROL, NORMAL, USER_DEFINED, BYTE = 3, 1, 4, 6


class Raw(NamedTuple):
    """A metadata value as its GGUF type and the bytes that follow it."""

    kind: int
    data: bytes


def vocabulary(*, byte_pieces: bool = False) -> dict[str, Any]:
    """The `tokenizer.ggml.*` keys of a few letters, words and runs of spaces."""
    pieces = [(piece, CONTROL) for piece in ("<pad>", "<eos>", "<bos>", "<unk>")]
    pieces += [("  ", USER_DEFINED), ("\n\n", USER_DEFINED)]
    pieces += [(f"<0x{i:02X}>", BYTE) for i in range(256 * byte_pieces)]
    pieces += [(piece, NORMAL) for piece in ("▁a", "ab", "▁", "a", "b", "é")]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece for piece, _ in pieces],
        "tokenizer.ggml.scores": [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [kind for _, kind in pieces],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }


def metadata(kind: str, num_layers: int, **changes: Any) -> dict[str, Any]:
    """Of a tiny Gemma; `changes` are keys of the architecture, with `__` for a dot."""
    values: dict[str, Any] = {
        "context_length": 128,
        "embedding_length": 96,
        "block_count": num_layers,
        "feed_forward_length": 160,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    if kind != "gemma":
        values["attention.sliding_window"] = 16
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {
        "general.architecture": kind,
        "general.name": f"tiny {kind}",
        **{f"{kind}.{key}": value for key, value in values.items()},
        **vocabulary(),
    }


def tensors(meta: Mapping[str, Any], *, tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors as a GGUF holds them: `[out, in]`, norms around 1."""
    kind = meta["general.architecture"]

    def get(key: str) -> int:
        return meta[f"{kind}.{key}"]

    hidden, ffw, head_dim = (
        get("embedding_length"),
        get("feed_forward_length"),
        get("attention.key_length"),
    )
    query = get("attention.head_count") * head_dim
    key_value = get("attention.head_count_kv") * head_dim
    layer = {
        "attn_norm": (hidden,),
        "attn_q": (query, hidden),
        "attn_k": (key_value, hidden),
        "attn_v": (key_value, hidden),
        "attn_output": (hidden, query),
        "ffn_norm": (hidden,),
        "ffn_gate": (ffw, hidden),
        "ffn_up": (ffw, hidden),
        "ffn_down": (hidden, ffw),
    }
    if kind != "gemma":
        layer |= {"post_attention_norm": (hidden,), "post_ffw_norm": (hidden,)}
    if kind == "gemma3":
        layer |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
    table = (len(meta["tokenizer.ggml.tokens"]), hidden)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": table}
    for i in range(get("block_count")):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["output_norm.weight"] = (hidden,)
    if not tied:
        shapes["output.weight"] = table
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_gguf(
    path: Path,
    meta: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    matrix_type: gguf.GGMLQuantizationType | Callable[[str], gguf.GGMLQuantizationType] = F32,
) -> Path:
    """Write a valid file with the `gguf` package, all but the norms in `matrix_type`, which may
    depend on the tensor's name."""
    writer = gguf.GGUFWriter(path, meta["general.architecture"])
    for key, value in meta.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, array in arrays.items():
        kind = matrix_type(name) if callable(matrix_type) else matrix_type
        kind = kind if array.ndim > 1 else F32
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Where the float16 numbers of a block are, in bytes.
_HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(
    kind: gguf.GGMLQuantizationType, num_rows: int, per_row: int, seed: int = 0
) -> np.ndarray:
    """Blocks of random bytes, their float16 numbers finite: uint8 `[rows, per_row * bytes]`."""
    rng = np.random.default_rng(seed)
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (num_rows * per_row, block_bytes), dtype=np.uint8)
    for start in _HALVES.get(kind.name, (0,)):
        halves = rng.normal(size=(len(blocks), 1)) * 10.0 ** rng.integers(-6, 3, (len(blocks), 1))
        blocks[:, start : start + 2] = halves.astype("<f2").view(np.uint8)
    return blocks.reshape(num_rows, -1)


def write_raw_blocks(path: Path, kind: gguf.GGMLQuantizationType, blocks: np.ndarray) -> Path:
    """Write one tensor, `t`, whose rows are the given bytes in blocks of `kind`."""
    writer = gguf.GGUFWriter(path, "gemma")
    writer.add_tensor("t", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pack_value(value: Any) -> bytes:
    """A metadata value with its type before it; `Raw` as it is."""
    match value:
        case Raw(kind, data):
            return struct.pack("<I", kind) + data
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<Ii", 5, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + pack_text(value)
        case list():
            items = [pack_value(item) for item in value]
            kind = items[0][:4] if items else struct.pack("<I", 8)
            return (
                struct.pack("<I", 9)
                + kind
                + struct.pack("<Q", len(items))
                + b"".join(i[4:] for i in items)
            )
    raise TypeError(type(value))


def pack_text(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def pack_info(name: str, dims: Iterable[int], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's entry; `dims` in the order of the file, the row length first."""
    dims = list(dims)
    return pack_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def pack_gguf(
    meta: Mapping[str, Any] | bytes,
    infos: Iterable[bytes],
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
) -> bytes:
    """The bytes of a file, with whatever mistakes are asked for."""
    infos = list(infos)
    if not isinstance(meta, bytes):
        num_keys = len(meta) if num_keys is None else num_keys
        meta = b"".join(pack_text(key) + pack_value(value) for key, value in meta.items())
    counts = struct.pack(
        "<IQQ", version, len(infos) if num_tensors is None else num_tensors, num_keys or 0
    )
    header = magic + counts + meta + b"".join(infos)
    return header + bytes(-len(header) % 32) + data


def pack_model(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """A whole float32 file; the same bytes as `write_gguf`, if `meta` is valid."""
    infos, data = [], b""
    for name, array in arrays.items():
        infos.append(pack_info(name, reversed(array.shape), 0, len(data)))
        data += array.tobytes() + bytes(-array.nbytes % 32)
    return pack_gguf(meta, infos, data)
