"""A tokenizer.json becomes the SentencePiece model that it was made from."""

from __future__ import annotations

import copy
import json

import pytest
import sentencepiece
import tokenizers
import transformers

from gemma_keras import open_checkpoint
from gemma_keras.checkpoints.hf.folder_tokenizer import read_folder_tokenizer
from gemma_keras.checkpoints.hf.tokenizer_json import tokenizer_json
from gemma_keras.errors import CheckpointError
from tests.gemma_keras.test_tokenizer import STRINGS
from tests.models import chat_tokenizer_model, tiny_tokenizer_model

ROWS = 460
MODEL = tiny_tokenizer_model(440)


def reread(data, folder, rows=ROWS) -> bytes:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    model = read_folder_tokenizer(folder, {}, rows).model
    assert model is not None
    return model


def processor(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def described(model):
    """Pieces and types."""
    pieces = processor(model)
    kinds = (pieces.is_control, pieces.is_unknown, pieces.is_byte, pieces.is_unused)
    ids = range(pieces.vocab_size())
    return [(pieces.id_to_piece(i), *(kind(i) for kind in kinds)) for i in ids]


@pytest.mark.sample
@pytest.mark.parametrize("writer", ["ours", "transformers"])
def test_the_real_tokenizer_comes_back(writer, tmp_path):
    model = open_checkpoint("sample").tokenizer_model
    if writer == "ours":
        data = tokenizer_json(model)
    else:
        (tmp_path / "tokenizer.model").write_bytes(model)
        named = {f"{n}_token": f"<{n}>" for n in ("bos", "eos", "pad", "unk")}
        config = {"tokenizer_class": "GemmaTokenizer", **named}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        theirs.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved/tokenizer.model").exists()
        data = json.loads((tmp_path / "saved/tokenizer.json").read_bytes())
    again = reread(data, tmp_path / "again", 262_144)
    original, found = processor(model), processor(again)
    different = [
        text for g in STRINGS.values() for text in g if original.encode(text) != found.encode(text)
    ]
    assert different == []
    assert described(again) == described(model)


@pytest.mark.parametrize("model", [MODEL, chat_tokenizer_model()])
def test_a_small_tokenizer_comes_back(model, tmp_path):
    data = tokenizer_json(model)
    again = reread(data, tmp_path)
    assert described(again) == described(model)
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    peer.encode_special_tokens = True
    original, found = processor(model), processor(again)
    for group in STRINGS.values():
        for text in group[::10]:
            ids = found.encode(text)
            assert ids == original.encode(text)
            assert ids == peer.encode(text, add_special_tokens=False).ids


def test_what_transformers_writes_of_a_small_tokenizer_comes_back(tmp_path):
    """It has no piece for a tab, as Gemma 1 and 2 have none, and is extended before it is saved."""
    (tmp_path / "tokenizer.model").write_bytes(MODEL)
    theirs = transformers.GemmaTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["<tool_call>", " two words"])
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    theirs.save_pretrained(tmp_path / "saved")
    folder = read_folder_tokenizer(tmp_path / "saved", {}, ROWS)
    found, original = processor(folder.model), processor(MODEL)
    # after <mask>, which it adds by itself
    assert [found.is_control(i) for i in range(440, 445)] == [True, False, False, True, True]
    texts = [text for group in STRINGS.values() for text in group[::10]]
    for text in texts:
        assert found.encode(text) == original.encode(text)
    for text in (*texts[::20], "a <tool_call> two words", "\t\ta\t"):
        assert found.encode(text) == theirs(text, add_special_tokens=False).input_ids
    # With the file that it came from beside it, it is that one.
    (tmp_path / "saved/tokenizer.model").write_bytes(MODEL)
    assert described(read_folder_tokenizer(tmp_path / "saved", {}, ROWS).model) == described(
        folder.model
    )


def test_a_tab_that_stands_for_its_byte_is_that_byte(tmp_path):
    data = tokenizer_json(MODEL)
    expected = reread(data, tmp_path / "a")
    vocabulary = data["model"]["vocab"]
    vocabulary["\t"] = vocabulary["<0x09>"]  # one id, two names, as some versions write it
    assert reread(data, tmp_path / "b") == expected
    del vocabulary["<0x09>"]
    assert reread(data, tmp_path / "c") == expected


def test_the_token_of_images_may_stand_in_the_vocabulary_too(tmp_path):
    data = tokenizer_json(MODEL)
    data["model"]["vocab"]["<image_soft_token>"] = 440
    token = dict(data["added_tokens"][0], id=440, content="<image_soft_token>")
    data["added_tokens"].append(token)
    (tmp_path / "tokenizer.model").write_bytes(MODEL)
    assert reread(data, tmp_path, rows=440) == MODEL
    with_images = processor(reread(data, tmp_path, rows=448))
    assert with_images.vocab_size() == 441 and with_images.is_control(440)
    (tmp_path / "tokenizer.model").unlink()
    assert described(reread(data, tmp_path, rows=440)) == described(MODEL)


def test_other_ways_to_write_the_same_are_read(tmp_path):
    data = tokenizer_json(MODEL)
    expected = reread(data, tmp_path / "a")
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    data["normalizer"] = {"type": "Sequence", "normalizers": [data["normalizer"]]}
    data["pre_tokenizer"] = None
    del data["model"]["type"]
    assert reread(data, tmp_path / "b") == expected
    data["normalizer"] = None
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    data["pre_tokenizer"] = space
    assert reread(data, tmp_path / "c") == expected


def _set(path, value):
    def change(data):
        *keys, last = path.split(".")
        for key in keys:
            data = data[key]
        data[last] = value

    return change


def _without_a_merge(data):
    del data["model"]["merges"][40]


def _shuffled(data):
    merges = data["model"]["merges"]
    unions = ["".join(pair) for pair in merges]
    first = next(i for i, u in enumerate(unions) if i + 1 < len(unions) and u == unions[i + 1])
    merges.append(merges.pop(first))


def _piece(name, index):
    return lambda data: data["model"]["vocab"].update({name: index})


REFUSED = {
    "is not read by this": (_set("model.type", "WordPiece"), "holds a 'WordPiece' tokenizer"),
    "unigram": (_set("model.type", "Unigram"), "holds a 'Unigram' tokenizer"),
    "none": (_set("model", None), 'has no key "model"'),
    "dropout": (_set("model.dropout", 0.1), "dropout = 0.1"),
    "prefix": (_set("model.continuing_subword_prefix", "##"), "continuing_subword_prefix = '##'"),
    "ignore_merges": (_set("model.ignore_merges", True), "ignore_merges = True"),
    "unk": (_set("model.unk_token", None), "has no unk_token"),
    "vocab": (_set("model.vocab", {}), "has no vocabulary"),
    "lower": (_set("normalizer", {"type": "Lowercase"}), "the normalizer Lowercase"),
    "prepend": (
        _set(
            "normalizer",
            {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
        ),
        "the normalizer Prepend",
    ),
    "no normalizer": (_set("normalizer", None), "pre-tokenizer 'Split'"),
    "bytes": (_set("pre_tokenizer", {"type": "ByteLevel"}), "the pre-tokenizer 'ByteLevel'"),
    "digits": (_set("pre_tokenizer", {"type": "Digits"}), "the pre-tokenizer 'Digits'"),
    "merges": (_set("model.merges", [["a"]]), "a merge that is not a pair"),
    "merge of nothing": (_set("model.merges", [["▁", "漢"]]), "are not in its vocabulary"),
    "a merge less": (_without_a_merge, "does not merge"),
    "shuffled": (_shuffled, "in two separate places"),
    "far id": (_piece("zzz", 1 << 40), "'zzz' twice, or with the invalid id"),
    "id of no row": (_piece("zzz", 460), r"ids up to 460; the embedding table has 460 rows"),
    "long": (_piece("z" * 600, 441), "pieces of 600 and together"),
    "bool": (_piece("zzz", True), "with the invalid id True"),
    "twice": (_piece("zzz", 7), "gives two tokens the same id"),
    "no list": (_set("added_tokens", {"a": 1}), "neither a list"),
    "bad token": (_set("added_tokens", [{"id": 3}]), "an added token that is not valid"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_sentencepiece_model_does_is_refused_by_name(case, tmp_path):
    change, message = REFUSED[case]
    data = copy.deepcopy(tokenizer_json(MODEL))
    change(data)
    with pytest.raises(CheckpointError, match=message):
        reread(data, tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"model": 3}', "\0", '{"a":' * 2_000])
def test_a_damaged_file_is_told(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_folder_tokenizer(tmp_path, {}, ROWS)
