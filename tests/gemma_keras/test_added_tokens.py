"""Added tokens, ids that end a text, and pieces that no text produces, whatever files call them."""

from __future__ import annotations

import json

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as proto

from gemma_keras import open_checkpoint
from gemma_keras.checkpoints.hf.folder_tokenizer import read_folder_tokenizer
from gemma_keras.checkpoints.hf.tokenizer_json import tokenizer_json
from gemma_keras.checkpoints.sentencepiece_model import build_sentencepiece_model, gguf_stops
from gemma_keras.checkpoints.special_pieces import with_control_pieces, with_pieces_in_text
from gemma_keras.errors import CheckpointError
from gemma_keras.text.chat import GEMMA_TURNS, encode_chat
from tests import gguf_files
from tests.gemma_keras.test_tokenizer import STRINGS
from tests.models import chat_tokenizer_model, tiny_tokenizer_model

MODEL = tiny_tokenizer_model()
ROWS = 320
CHATML = {"<tool_call>": 300, "<|im_start|>": 303, "<|im_end|>": 304}


def processor(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture
def read(tmp_path):
    """What a folder of these files is read as; `tokenizer.model` is the small one."""

    def read_files(rows=ROWS, config=None, model=MODEL, **files):
        if model is not None:
            (tmp_path / "tokenizer.model").write_bytes(model)
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return read_folder_tokenizer(tmp_path, config or {}, rows)

    return read_files


def entry(content, index, **flags):
    usual = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    return usual | {"content": content, "id": index} | flags


def decoder(**pieces):
    return {"added_tokens_decoder": {index: entry(text, 0) for text, index in pieces.items()}}


def test_without_added_tokens_the_model_is_the_files_own(read):
    assert read().model == MODEL
    assert read(tokenizer=tokenizer_json(MODEL)).model == MODEL


@pytest.mark.parametrize("form", ["added_tokens", "tokenizer_config", "tokenizer"])
def test_added_tokens_are_pieces_in_each_form_of_the_files(read, form):
    if form == "added_tokens":
        found = read(added_tokens=CHATML)
    elif form == "tokenizer_config":
        found = read(
            tokenizer_config={"added_tokens_decoder": {i: entry(t, 0) for t, i in CHATML.items()}}
        )
    else:
        data = tokenizer_json(MODEL)
        data["added_tokens"] += [entry(text, index) for text, index in CHATML.items()]
        found = read(tokenizer=data)
    pieces = processor(found.model)
    assert pieces.vocab_size() == 305
    assert [pieces.piece_to_id(text) for text in CHATML] == [300, 303, 304]
    assert [pieces.is_control(i) for i in (300, 303, 304)] == [False, True, True]
    assert [pieces.is_unused(i) for i in (300, 301, 302)] == [False, True, True]
    plain = processor(MODEL)
    text = "a boat<tool_call> the<|im_end|>"
    ids = [*plain.encode("a boat"), 300, *plain.encode(" the"), *plain.encode("<|im_end|>")]
    assert pieces.encode(text) == ids
    assert pieces.decode(ids) == text


def test_the_ids_are_those_of_the_tokenizers_library(read, tmp_path):
    data = tokenizer_json(MODEL)
    tokens = ["<tool_call>", "two words", " led", "é\n", "\n\n", "<t", "▁boat"]
    data["added_tokens"] += [entry(t, 300 + i, normalized="▁" in t) for i, t in enumerate(tokens)]
    found = processor(read(tokenizer=data).model)
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    peer.encode_special_tokens = True
    texts = [t for g in STRINGS.values() for t in g[::25]]
    texts += [f"a{t}b {t} {u}" for t in tokens for u in tokens] + ["A boat  led", "two  words"]
    for text in texts:
        assert found.encode(text) == peer.encode(text, add_special_tokens=False).ids


def test_a_special_token_is_a_control_piece_and_any_other_is_found_in_text(read):
    flags = {"special": True, "lstrip": True}
    data = tokenizer_json(MODEL)
    data["added_tokens"] += [entry("<mask>", 300, **flags), entry("<b>", 301, normalized=True)]
    pieces = processor(read(tokenizer=data).model)
    assert pieces.is_control(300) and 300 not in pieces.encode("<mask>")
    assert pieces.encode("<b>") == [301]


def test_old_files_say_in_a_map_what_is_special(read):
    names = {"additional_special_tokens": [{"content": "<a>"}, "<b>"], "sep_token": "<c>"}
    added = {"<a>": 300, "<b>": 301, "<c>": 302, "<d>": 303}
    pieces = processor(read(added_tokens=added, special_tokens_map=names).model)
    assert [pieces.is_control(i) for i in added.values()] == [True, True, True, False]


def test_a_reserved_piece_is_renamed(read):
    model = chat_tokenizer_model()
    renamed = decoder(**{"<|im_start|>": 297, "<|im_end|>": 298})
    pieces = processor(read(model=model, tokenizer_config=renamed).model)
    assert [pieces.id_to_piece(i) for i in (297, 298)] == ["<|im_start|>", "<|im_end|>"]
    assert pieces.vocab_size() == 300


def test_the_token_of_images_has_no_row_in_a_model_of_text(read):
    assert read(rows=300, added_tokens={"<image_soft_token>": 300}).model == MODEL
    with pytest.raises(CheckpointError, match=r"'<x>' of id 300 has no row.*which has 300"):
        read(rows=300, added_tokens={"<x>": 300})


REFUSED = {
    "far": ({"added_tokens": {"<x>": 1 << 40}}, "'<x>' of id 1099511627776 has no row"),
    "negative": ({"added_tokens": {"<x>": -1}}, "'<x>' the id -1"),
    "bool": ({"added_tokens": {"<x>": True}}, "'<x>' the id True"),
    "text": ({"added_tokens": {"<x>": "abc"}}, "'<x>' the id 'abc'"),
    "empty": ({"added_tokens": {"": 300}}, "has no text"),
    "surrogate": ({"added_tokens": {"\ud800": 300}}, "half of a surrogate"),
    "NUL": ({"added_tokens": {"a\0": 300}}, "a NUL character"),
    "there": ({"added_tokens": {"e": 300}}, "'e' of id 300 already exists with the id"),
    "a word": ({"added_tokens": {"<x>": 290}}, "'<x>' of id 290 has the id of"),
    "its end": ({"added_tokens": {"<x>": 1}}, "has the id of '<eos>'"),
    "two ids": ({"added_tokens": {"a b": 300, "a▁b": 301}}, "occurs twice"),
    "two texts": ({"added_tokens": {"a b": 300, "<c>": 300}}, "has the same id as 'a b'"),
    "word": (
        {"tokenizer_config": {"added_tokens_decoder": {"300": entry("w", 0, single_word=True)}}},
        "'w' of id 300 matches only whole words",
    ),
    "turn": (
        {"tokenizer_config": {"added_tokens_decoder": {"300": entry("<|im_end|>", 0, special=True, rstrip=True)}}},
        "includes neighbouring spaces",
    ),
    "list": ({"tokenizer_config": {"added_tokens_decoder": [3]}}, "neither a list nor an object"),
    "decoder": ({"tokenizer_config": {"added_tokens_decoder": {"300": 3}}}, "is not valid: 3"),
    "eos": ({"config": {"eos_token_id": "1"}}, "eos_token_id in config.json is '1'"),
    "eos list": ({"generation_config": {"eos_token_id": [1, 2.0]}}, "in generation_config.json is"),
    "more pieces": ({"rows": 299}, "has 300 tokens, but the model's vocabulary has 299"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(case, read):
    files, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        read(**files)


def test_a_tokenizer_that_sentencepiece_refuses_is_told(read):
    parsed = proto.ModelProto.FromString(MODEL)
    parsed.pieces[-1].piece = parsed.pieces[-2].piece
    with pytest.raises(CheckpointError, match="SentencePiece cannot load the tokenizer"):
        read(model=parsed.SerializeToString())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n", "git lfs pull"),
        (b"\xff\xff\xff", "not a SentencePiece model"),
        (b"", "has no tokens"),
    ],
)
def test_a_damaged_tokenizer_is_told(content, message, read):
    with pytest.raises(CheckpointError, match=rf"tokenizer\.model.*{message}"):
        read(model=content)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("vocab.txt", "WordPiece"), ("gemma.tiktoken", "tiktoken"), ("vocab.json", "byte-level BPE")],
)
def test_another_kind_of_tokenizer_is_told(name, kind, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"a {kind} tokenizer .{name}."):
        read_folder_tokenizer(tmp_path, {}, ROWS)
    (tmp_path / name).unlink()
    assert read_folder_tokenizer(tmp_path, {}, ROWS).model is None


def test_ids_that_end_a_text_come_from_every_file(read):
    found = read(
        config={"eos_token_id": 1, "text_config": {"eos_token_id": [5, 900, -1]}},
        generation_config={"eos_token_id": [7, 1]},
        tokenizer_config={"eos_token": "<|im_end|>"},
        added_tokens=CHATML,
    )
    assert found.stop == (7, 1, 5, 304)
    assert not any(processor(found.model).is_control(i) for i in (5, 7))  # bytes stay bytes


def test_gguf_has_three_keys_for_them():
    keys = gguf_files.vocabulary() | {
        "tokenizer.ggml.tokens": ["<pad>", "<eos>", "<bos>", "<unk>", "<e>", "f"]
    }
    keys |= {"tokenizer.ggml.scores": [0.0] * 6, "tokenizer.ggml.token_type": [1, 1, 1, 1, 4, 4]}
    keys |= {
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 1,
    }
    assert gguf_stops(keys) == (4, 5, 1)
    pieces = processor(build_sentencepiece_model(keys))
    assert (pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (2, 1, 0)
    assert [pieces.is_control(i) for i in range(6)] == [True, True, True, False, True, False]
    keys["tokenizer.ggml.eot_token_id"] = 6
    with pytest.raises(CheckpointError, match="eot_token_id is 6"):
        gguf_stops(keys)


# --- text does not become a control token ---------------------------------------------------------

MARKS = ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>")


@pytest.mark.sample
@pytest.mark.parametrize("kind", ["NORMAL", "CONTROL", "USER_DEFINED", "UNUSED"])
def test_however_turns_are_typed_a_text_is_cut_alike(kind):
    sample = open_checkpoint("sample").tokenizer_model
    parsed = proto.ModelProto.FromString(sample)
    for piece in parsed.pieces:
        if piece.piece in MARKS:
            piece.type = getattr(parsed.SentencePiece, kind)
    model = with_control_pieces(parsed.SerializeToString())
    assert model == sample
    pieces = processor(model)
    ids = [236820, 3041, 236779, 1340, 236779, 887, 236813, 2364]
    assert pieces.encode("<start_of_turn>user") == ids
    assert processor(with_pieces_in_text(model)).encode("<start_of_turn>user") == [105, 2364]


@pytest.mark.parametrize("kind", [1, 3, 4, 5])
def test_a_message_holds_no_turns(kind):
    model = with_control_pieces(chat_tokenizer_model(turn_type=kind))
    text = "".join(MARKS)
    ids = encode_chat(model, [{"role": "user", "content": text}], GEMMA_TURNS)
    assert [i for i in ids if i in (0, 1, 2, 297, 298)] == [2, 297, 298, 297]
    assert processor(with_pieces_in_text(model)).encode(text) == [297, 298, 2, 1, 0]
