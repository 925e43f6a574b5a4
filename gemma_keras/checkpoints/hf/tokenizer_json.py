"""Writes Gemma's SentencePiece tokenizer as a `tokenizer.json`, which other runtimes read.

A SentencePiece BPE model repeatedly merges the neighbours whose concatenation is the token with the
highest score. A `tokenizer.json` of type BPE lists the merges in order. So every way to split a
token into two tokens is listed, by falling score. User-defined tokens are matched in the text
first, the longest one at each place; so they become added tokens. Those of spaces are written with
spaces, not with U+2581. onnxruntime-genai matches them in the original text, and prints them
unchanged. (transformers' own conversion writes U+2581 and matches it in the original text, which
has none. So it merges runs of spaces differently.)

One difference is intended: control tokens are matched in the text, as chat templates of that
ecosystem need. `edge_demo` adds them by id and treats such text as plain text.

Format: huggingface.co/docs/tokenizers. SentencePiece: `src/bpe_model.cc`, `src/normalizer.cc`.
"""

from __future__ import annotations

from typing import Any

from gemma_keras.checkpoints.sentencepiece_model import SPACE, parse_tokenizer


def tokenizer_json(model: bytes) -> dict[str, Any]:
    """The content of `tokenizer.json`.

    Args:
        model: the serialized SentencePiece model.

    Raises:
        CheckpointError: it is not BPE, or normalizes text, which Gemma's tokenizer does not.
    """
    parsed = parse_tokenizer(model)
    kinds = parsed.SentencePiece
    pieces = [
        (p.piece.replace(SPACE, " ") if p.type == kinds.USER_DEFINED else p.piece, p.score, p.type)
        for p in parsed.pieces
    ]
    unknown = next(piece for piece, _, kind in pieces if kind == kinds.UNKNOWN)
    bos_id = parsed.trainer_spec.bos_id
    bos = pieces[bos_id][0]
    special = (kinds.CONTROL, kinds.UNKNOWN)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": kind not in special,
                "special": kind in special,
            }
            for index, (piece, _, kind) in enumerate(pieces)
            if kind in (*special, kinds.USER_DEFINED)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        # No space is left to split at; runtimes that know Gemma's file expect the entry.
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": _begins_with(bos, bos_id),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": parsed.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece: index for index, (piece, _, _) in enumerate(pieces)},
            "merges": _merges([(p, score) for p, score, kind in pieces if kind == kinds.NORMAL]),
        },
    }


def _merges(pieces: list[tuple[str, float]]) -> list[list[str]]:
    """Returns every pair of tokens whose concatenation is a token, ordered by its score, highest
    first."""
    known = {piece for piece, _ in pieces}
    by_score = sorted(pieces, key=lambda entry: -entry[1])
    return [
        [piece[:cut], piece[cut:]]
        for piece, _ in by_score
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def _begins_with(bos: str, bos_id: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"SpecialToken": {"id": bos, "type_id": 1}}, other],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
