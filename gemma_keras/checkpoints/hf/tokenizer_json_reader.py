"""Reads a `tokenizer.json` as an equivalent SentencePiece model; the inverse of `tokenizer_json`.

Such a file lists merges in order, while SentencePiece has a score for each result. So the tokens
get falling scores in the order of their first merge. The result is equivalent if every way to split
a token in two is listed. All splits of one token must be listed before those of the next. Otherwise
no SentencePiece model is equivalent, and the file is rejected. Merges that contain an added token
are ignored, because added tokens are matched first.

Format: huggingface.co/docs/tokenizers.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_keras.checkpoints.hf.added_tokens import OF_IMAGES, AddedToken, add_unused, unused_name
from gemma_keras.checkpoints.sentencepiece_model import SPACE, empty_model
from gemma_keras.errors import CheckpointError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MOST_MERGES = 1 << 23
_LONGEST_PIECE, _MOST_CHARACTERS = 512, 1 << 24  # each place in a piece is looked at
_NORMAL = 1  # SentencePiece's number of the type
_TAB, _TAB_BYTE = "\t", "<0x09>"
_NOT = "; Gemma needs a SentencePiece BPE model"
# Values that entries of the model must have, if present, so that an equivalent SentencePiece model
# exists.
_MODEL_FIXED: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (None, False),
}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def read_vocabulary(data: Mapping[str, Any], file: str) -> dict[str, int]:
    """The vocabulary of a `tokenizer.json`, text with U+2581 for spaces to id.

    Raises:
        CheckpointError: it is not BPE, or it is damaged.
    """
    model = data.get("model")
    if not isinstance(model, Mapping):
        raise CheckpointError(f'{file} has no key "model"')
    # Files of old versions do not say their type, but only BPE has merges.
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise CheckpointError(f"{file} holds a {reprlib.repr(kind)} tokenizer{_NOT}")
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, Mapping) or not vocabulary:
        raise CheckpointError(f"{file} has no vocabulary")
    found: dict[str, int] = {}
    for text, index in vocabulary.items():
        piece = text.replace(" ", SPACE)
        if type(index) is not int or not 0 <= index < 1 << 24 or piece in found:
            raise CheckpointError(
                f"{file} has the token {reprlib.repr(text)} twice, or with the invalid id "
                f"{reprlib.repr(index)}"
            )
        found[piece] = index
    # transformers calls the byte of a tab by its character where no other piece is one.
    tab = found.get(_TAB, -1)
    if tab > 0 and found.get("<0x08>") == tab - 1 and found.get(_TAB_BYTE, tab) == tab:
        found[_TAB_BYTE] = found.pop(_TAB)
    lengths = [len(piece) for piece in found]
    if max(lengths) > _LONGEST_PIECE or sum(lengths) > _MOST_CHARACTERS:
        raise CheckpointError(
            f"{file} has pieces of {max(lengths):,} and together {sum(lengths):,} "
            "characters, which is too large for a tokenizer"
        )
    if len(set(found.values())) != len(found):
        raise CheckpointError(f"{file} gives two tokens the same id")
    return found


def read_tokenizer_json(
    data: Mapping[str, Any],
    added: Sequence[AddedToken],
    names: Mapping[str, str],
    rows: int,
    file: str = "tokenizer.json",
) -> Any:
    """The SentencePiece model of a `tokenizer.json`, as its protobuf message.

    Args:
        data: the content.
        added: its added tokens, which get their types in it.
        names: `bos`, `eos` and `pad` to the texts that other files give them.
        rows: of the model's table.
        file: its name, for people.

    Raises:
        CheckpointError: no SentencePiece model is equivalent; the message says why.
    """
    vocabulary = read_vocabulary(data, file)
    vocabulary = {p: i for p, i in vocabulary.items() if i < rows or p not in OF_IMAGES}
    model = data["model"]
    for key, allowed in _MODEL_FIXED.items():
        if model.get(key) not in allowed:
            raise CheckpointError(f"{file} has {key} = {reprlib.repr(model[key])}{_NOT}")
    _check_text_is_kept(data, file)
    if max(vocabulary.values()) >= rows:
        raise CheckpointError(
            f"{file} has token ids up to {max(vocabulary.values()):,}; the embedding table "
            f"has {rows:,} rows"
        )
    unknown = model.get("unk_token")
    if not isinstance(unknown, str) or unknown not in vocabulary:
        raise CheckpointError(f"{file} has no unk_token in its vocabulary{_NOT}")
    kinds = _kinds(vocabulary, {token.piece for token in added}, unknown, model)
    by_score = _by_score(kinds, _merges(model, file), file)
    built = _build(vocabulary, kinds, by_score)
    trainer = built.trainer_spec
    trainer.byte_fallback = bool(model.get("byte_fallback"))
    trainer.unk_id, trainer.unk_piece = vocabulary[unknown], unknown
    for role in ("bos", "eos", "pad"):
        piece = f"<{role}>" if f"<{role}>" in vocabulary else names.get(role, f"<{role}>")
        setattr(trainer, f"{role}_piece", piece)
        setattr(trainer, f"{role}_id", vocabulary.get(piece, -1))
    return built


def _kinds(
    vocabulary: Mapping[str, int], added: set[str], unknown: str, model: Mapping[str, Any]
) -> dict[str, int]:
    """Each piece's type in SentencePiece; an added token's as if none was special."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    kinds = proto.ModelProto.SentencePiece
    found = {}
    for piece, index in vocabulary.items():
        found[piece] = kinds.NORMAL
        if piece == unknown:
            found[piece] = kinds.UNKNOWN
        elif model.get("byte_fallback") and _BYTE.fullmatch(piece):
            found[piece] = kinds.BYTE
        elif piece in added:
            found[piece] = kinds.USER_DEFINED
        elif piece == unused_name(index):
            found[piece] = kinds.UNUSED
    return found


def _check_text_is_kept(data: Mapping[str, Any], file: str) -> None:
    """Raise an error for normalizers and pre-tokenizers that differ from Gemma's SentencePiece
    model."""
    normalizers = _steps(data.get("normalizer"), "normalizers")
    splits = _steps(data.get("pre_tokenizer"), "pretokenizers")
    replaced = normalizers == [_REPLACE]
    if normalizers and not replaced:
        kinds = [str(step.get("type")) for step in normalizers]
        raise CheckpointError(
            f"{file} uses the normalizer {', '.join(kinds)}; Gemma's tokenizer only "
            "replaces spaces by U+2581"
        )
    for step in splits:
        kind = step.get("type")
        if kind == "Metaspace" and not normalizers:
            never = step.get("prepend_scheme") == "never" and step.get("split") is False
            replaced = never and step.get("replacement", SPACE) == SPACE
        # No space is left to split at.
        elif kind != "Split" or not replaced or step.get("pattern") != {"String": " "}:
            raise CheckpointError(
                f"{file} uses the pre-tokenizer {reprlib.repr(kind)}, which SentencePiece "
                "models like Gemma's do not have"
            )
    if not replaced:
        raise CheckpointError(
            f"{file} does not replace spaces by U+2581, as Gemma's tokenizer does"
        )


def _steps(step: Any, key: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if step is None:
        return []
    if not isinstance(step, Mapping):
        return [{"type": step}]
    if step.get("type") != "Sequence":
        return [step]
    inner = step.get(key)
    return [s for entry in inner for s in _steps(entry, key)] if isinstance(inner, list) else [step]


def _merges(model: Mapping[str, Any], file: str) -> list[tuple[str, str]]:
    """Both forms of the list: pairs, and texts with a space between."""
    merges = model.get("merges")
    if not isinstance(merges, list) or len(merges) > _MOST_MERGES:
        raise CheckpointError(f"{file} has no list of merges")
    pairs = []
    for entry in merges:
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(pair, list) or len(pair) != 2 or set(map(type, pair)) != {str}:
            raise CheckpointError(f"{file} has a merge that is not a pair: {reprlib.repr(entry)}")
        pairs.append((pair[0], pair[1]))
    return pairs


def _by_score(kinds: Mapping[str, int], merges: Sequence[tuple[str, str]], file: str) -> list[str]:
    """Returns the tokens that merges produce, in order of their first merge."""
    normal = {piece for piece, kind in kinds.items() if kind == _NORMAL}
    parts = normal if _TAB in kinds else normal | {_TAB}
    cuts: dict[str, list[int]] = {}  # where the list cuts each piece in two
    last = None
    for left, right in merges:
        union = left + right
        if not (union in normal and left in parts and right in parts):
            if not all(piece in kinds or piece == _TAB for piece in (left, right, union)):
                raise CheckpointError(
                    f"{file} merges {reprlib.repr(left)} and {reprlib.repr(right)}, but "
                    "these or the result are not in its vocabulary"
                )
            continue
        if union == last:
            cuts[union].append(len(left))
        elif union in cuts:
            raise CheckpointError(
                f"{file} lists merges to {reprlib.repr(union)} in two separate places; "
                "SentencePiece has only one score for each token"
            )
        else:
            cuts[union] = [len(left)]
            last = union
    for piece in normal:
        listed = cuts.get(piece, ())
        for cut in range(1, len(piece)):
            if cut not in listed and piece[:cut] in normal and piece[cut:] in normal:
                raise CheckpointError(
                    f"{file} does not merge {reprlib.repr(piece[:cut])} and "
                    f"{reprlib.repr(piece[cut:])} to the token {reprlib.repr(piece)}, but "
                    "SentencePiece would"
                )
    return list(cuts)


def _build(vocabulary: Mapping[str, int], kinds: Mapping[str, int], by_score: Sequence[str]) -> Any:
    """A model of these pieces, the places between them unused."""
    model = empty_model()
    score = {piece: -float(place) for place, piece in enumerate(by_score)}
    least = -float(len(score))  # what is never joined, as single characters are
    by_id = {index: piece for piece, index in vocabulary.items()}
    places = dict(vocabulary)
    for index in range(max(by_id) + 1):
        if piece := by_id.get(index):
            model.pieces.add(piece=piece, score=score.get(piece, least), type=kinds[piece])
        else:
            add_unused(model, places)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model
