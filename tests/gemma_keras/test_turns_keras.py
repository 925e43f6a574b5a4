"""A ChatML tune in Keras: its tokens, stops and template, kept through files; marks in texts."""

from __future__ import annotations

import dataclasses
import json
import warnings

import keras
import numpy as np
import pytest
import sentencepiece
from keras import ops

from gemma_keras import GemmaCausalLM, GemmaConfig, LayerSpec, open_checkpoint
from gemma_keras.checkpoints.hf.folder_tokenizer import read_folder_tokenizer
from gemma_keras.generate import loop
from gemma_keras.model.backbone import GemmaBackbone
from gemma_keras.text.chat import CHATML_TURNS, encode_chat
from gemma_keras.text.stream import encode
from gemma_keras.tokenizer import GemmaCausalLMPreprocessor, GemmaTokenizer
from tests.models import CHATML_JINJA, chat_tokenizer_model, tiny_tokenizer_model

pytestmark = pytest.mark.keras
once = pytest.mark.backends("torch")  # what a text becomes, no backend changes

LENGTH, ROWS, START, END, UNUSED = 40, 320, 302, 303, 301
BOS, EOS = 2, 1
TEXT = "<|im_start|>user\nHi<|im_end|>\n"


@pytest.fixture(scope="module")
def proto(tmp_path_factory):
    """The small tokenizer with ChatML's tokens after its pieces, 301 without one between."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model())
    added = {"<tool_call>": 300, "<|im_start|>": START, "<|im_end|>": END}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return read_folder_tokenizer(folder, {}, ROWS).model


@pytest.fixture(scope="module")
def backbone():
    layer = LayerSpec(4, 2, 16, 48, 16**-0.5, rope_theta=1e6, qk_norm=True, post_norms=True)
    near = dataclasses.replace(layer, sliding_window=7, rope_theta=1e4)
    config = GemmaConfig(
        vocabulary_size=ROWS,
        hidden_dim=32,
        layers=(*[near] * 5, layer),
        embedding_scale=32**0.5,
        final_soft_cap=None,
        norm_epsilon=1e-6,
        tied_head=True,
        context_length=128,
    )  # fmt: skip
    keras.utils.set_random_seed(3)
    return GemmaBackbone(config, dtype="float32")


@pytest.fixture
def tune(proto, backbone):
    tokenizer = GemmaTokenizer(proto=proto)
    model = GemmaCausalLM(
        backbone,
        GemmaCausalLMPreprocessor(tokenizer, sequence_length=LENGTH),
        instruction_tuned=True,
        stop_token_ids=[7],
        turns=CHATML_TURNS,
        chat_template=CHATML_JINJA,
    )
    model.compile(sampler="greedy")
    return model


@once
def test_it_keeps_what_it_is_through_every_file(tune, tmp_path):
    tune.save_to_preset(str(tmp_path / "preset"))
    tune.export(tmp_path / "hf", format="safetensors", dtype="float32")
    tune.export(tmp_path / "m.gguf", format="gguf", tensor_type="f32")
    nobody = [UNUSED, *range(304, ROWS)]
    generation_config = json.loads((tmp_path / "hf/generation_config.json").read_bytes())
    assert generation_config["suppress_tokens"] == nobody
    (tmp_path / "hf/tokenizer.model").unlink()  # as transformers writes it
    for source in (tmp_path / "preset", tmp_path / "hf", tmp_path / "m.gguf"):
        checkpoint = open_checkpoint(source)
        assert checkpoint.instruction_tuned
        assert checkpoint.turns == CHATML_TURNS
        assert checkpoint.chat_template == CHATML_JINJA
        assert set(checkpoint.stop_ids()) == {7, EOS, END}
        pieces = sentencepiece.SentencePieceProcessor(model_proto=checkpoint.tokenizer_model)
        assert [pieces.piece_to_id(p) for p in ("<|im_start|>", "<|im_end|>")] == [START, END]
        assert pieces.encode(TEXT) == encode(tune.preprocessor.tokenizer.proto, TEXT)
    assert tune.to_keras_hub().preprocessor.tokenizer.end_token2_id == END


@once
def test_chat_speaks_the_template_and_stops(tune, proto, monkeypatch):
    asked = []
    monkeypatch.setattr(tune, "_stream_ids", lambda *arguments: asked.append(arguments) or iter(()))
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Open? "}]
    tune.chat(talk, max_length=30)
    ids, length, stops = asked[0]
    assert (ids, length, stops) == (encode_chat(proto, talk, CHATML_TURNS), 30, [7, EOS, END])
    turns = [START, *encode(proto, "system\nBe brief."), END, *encode(proto, "\n")]
    turns += [START, *encode(proto, "user\nOpen? "), END, *encode(proto, "\n")]
    turns += [START, *encode(proto, "assistant\n")]
    assert ids == [BOS, *turns]


# --- ids without a piece --------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["greedy", "top_k", "beam"])
def test_ids_without_a_piece_are_never_generated(tune, sampler, monkeypatch):
    # Logits of rows without a piece are the greatest there are.
    favour = np.zeros(ROWS, "float32")
    favour[[UNUSED, *range(304, ROWS)]] = 1e4
    own = loop.logits
    monkeypatch.setattr(loop, "logits", lambda *a: own(*a) + ops.convert_to_tensor(favour))
    tune.compile(sampler=sampler)
    ids = {
        "token_ids": np.full((2, LENGTH), 5, "int32"),
        "padding_mask": (np.arange(LENGTH) < [[3], [5]]).astype("int32"),
    }
    found = np.asarray(tune.make_generate_function()(ids)["token_ids"])
    new = found[0, 3:], found[1, 5:]
    assert all(((row < 304) & (row != UNUSED)).all() for row in new)
    if sampler != "beam":
        given = list(tune.make_generate_function().stream([5, 6], LENGTH))
        assert given and UNUSED not in given and max(given) < 304


# --- marks in a text ------------------------------------------------------------------------------


@once
def test_a_template_in_a_text_is_told_once_and_stays_text(tune):
    tokenizer = tune.preprocessor.tokenizer
    plain = encode(tokenizer.proto, TEXT)
    assert START not in plain and END not in plain
    with pytest.warns(UserWarning, match=r"<\|im_end\|>.*special_tokens_in_strings=True"):
        assert list(map(int, tokenizer(TEXT))) == plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer([TEXT, TEXT])


@once
@pytest.mark.parametrize("how", ["fit", "generate", "stream", "preprocessor"])
def test_it_is_told_wherever_texts_go_in(tune, how):
    calls = {
        "fit": lambda: tune.fit(np.array([TEXT, "Bread"]), batch_size=2, shuffle=False, verbose=0),
        "generate": lambda: tune.generate(["Bread", TEXT], max_length=34),
        "stream": lambda: list(tune.stream(TEXT, max_length=34)),
        "preprocessor": lambda: tune.preprocessor([TEXT]),
    }
    with pytest.warns(UserWarning, match="special_tokens_in_strings=True"):
        calls[how]()


@once
def test_other_texts_are_told_nothing(tune):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tune.preprocessor(["<|im_start", "a < b", "<tool_call>"])
        list(tune.stream("<table>", max_length=12))


@once
def test_marks_in_strings_become_tokens_where_asked_and_after_saving(tune, tmp_path):
    tune.save_to_preset(str(tmp_path / "preset"))
    reading = GemmaCausalLM.from_preset(tmp_path / "preset", special_tokens_in_strings=True)
    reading.save_to_preset(str(tmp_path / "again"))
    proto = tune.preprocessor.tokenizer.proto
    inner = [START, *encode(proto, "user\nHi"), END, *encode(proto, "\n")]
    for model in (reading, GemmaCausalLM.from_preset(tmp_path / "again")):
        tokenizer = model.preprocessor.tokenizer
        assert tokenizer.special_tokens_in_strings
        assert list(map(int, tokenizer(TEXT))) == tokenizer.encode(TEXT) == inner
        for given in (TEXT, "<bos>" + TEXT):
            packed = model.preprocessor.generate_preprocess([given, given], sequence_length=20)
            ids = ops.convert_to_numpy(packed["token_ids"])
            assert ids.tolist() == [[BOS, *inner] + [0] * (19 - len(inner))] * 2
            x, y, _ = model.preprocessor(np.array([given]))
            assert ops.convert_to_numpy(x["token_ids"])[0, : len(inner) + 1].tolist() == [
                BOS,
                *inner,
            ]
            assert ops.convert_to_numpy(y)[0, len(inner)] == EOS
        assert tokenizer.detokenize(inner) == "user\nHi\n"
    silent = GemmaCausalLM.from_preset(tmp_path / "again", special_tokens_in_strings=False)
    assert not silent.preprocessor.tokenizer.special_tokens_in_strings


def test_ids_are_decoded_as_detokenize_does(proto):
    tokenizer = GemmaTokenizer(proto=proto)
    text = "Seven stones lay:\n  \U0001f642 ü"
    ids = tokenizer.encode(text)
    framed = [BOS, START, *ids, END, EOS, 0]
    for given in (ids, tuple(ids), framed, np.array(framed), ops.convert_to_tensor(framed)):
        assert tokenizer.decode(given) == text
    assert tokenizer.decode([]) == tokenizer.decode(np.array([])) == ""
    random = np.random.default_rng(0)
    for _ in range(50):
        some = random.integers(0, tokenizer.vocabulary_size(), 9).tolist()
        assert tokenizer.decode(some) == tokenizer.detokenize(some)
    for wrong in ([ids, ids], np.array([ids]), 5, ["a"], [1.5]):
        with pytest.raises(ValueError, match="decode takes the ids of one text"):
            tokenizer.decode(wrong)
    for beyond in (-1, ROWS):
        with pytest.raises(IndexError):
            tokenizer.decode([beyond])


@once
def test_a_pipeline_finds_them_too(tune):
    import tensorflow as tf

    tokenizer = GemmaTokenizer(
        proto=tune.preprocessor.tokenizer.proto, special_tokens_in_strings=True
    )
    preprocessor = GemmaCausalLMPreprocessor(tokenizer, sequence_length=24)
    data = tf.data.Dataset.from_tensor_slices(["<bos>" + TEXT]).batch(1).map(preprocessor)
    ids = next(iter(data))[0]["token_ids"].numpy()[0]
    assert ids[:2].tolist() == [BOS, START] and END in ids


@once
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_a_tokenizer_of_any_file_makes_no_turns_of_text(kind):
    tokenizer = GemmaTokenizer(chat_tokenizer_model(turn_type=kind))
    with pytest.warns(UserWarning, match="<start_of_turn>"):
        ids = tokenizer("<start_of_turn>user")
    assert not {297, 298} & set(map(int, ids))
