"""Text to ids and back, whole and piece by piece, against SentencePiece's own decoding."""

from __future__ import annotations

import dataclasses

import pytest
import sentencepiece
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto

from edge_demo.bundle.reader import Bundle
from edge_demo.errors import BundleError
from edge_demo.text.tokenizer import Tokenizer
from tests.edge_demo.bundle_files import copy_bundle, edit_manifest, rewrite
from tests.models import VOCABULARY_SIZE, chat_tokenizer_model

PAD, EOS, BOS, UNKNOWN, FIRST_BYTE = 0, 1, 2, 3, 4
START, END = VOCABULARY_SIZE - 3, VOCABULARY_SIZE - 2
SPACES = VOCABULARY_SIZE - 1
CONTROLS = (PAD, EOS, BOS, START, END)


@pytest.fixture(scope="module")
def chat(tiny_bundles) -> Tokenizer:
    return Tokenizer(Bundle.open(tiny_bundles / "chat"))


@pytest.fixture(scope="module")
def chatml(tiny_bundles) -> Tokenizer:
    return Tokenizer(Bundle.open(tiny_bundles / "chatml"))


@pytest.fixture(scope="module")
def base(tiny_bundles) -> Tokenizer:
    return Tokenizer(Bundle.open(tiny_bundles / "gemma3-int8"))


@pytest.fixture
def damaged_chat(tiny_bundles, tmp_path):
    return copy_bundle(tiny_bundles / "chat", tmp_path / "damaged")


def peer(tokenizer, bundle):
    path = bundle / tokenizer.spec.file
    return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())


@pytest.fixture(scope="module")
def chat_peer(chat, tiny_bundles):
    return peer(chat, tiny_bundles / "chat")


def byte(value):
    return FIRST_BYTE + value


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return [*(stream.push(i) for i in ids), stream.flush()]


# --- streaming -----------------------------------------------------------------------------------

TEXT = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("The gardener waters  two\n\t\u2581😀👩‍👩‍👧é\u0301ß漢\ufffd\0\x1b"),
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(TEXT)
@example("👩‍👩‍👧 🇩🇪 e\u0301")
@example("  two  spaces   ")
def test_a_text_streams_back_as_itself_and_no_piece_is_broken(chat, text):
    assume("\u2581" not in text)  # SentencePiece's own sign for a space
    ids = chat.encode(text)
    assert ids[0] == BOS and ids[1:] == chat.encode(text, bos=False)
    pieces = streamed(chat, ids)
    assert "".join(pieces) == chat.decode(ids) == text
    assert all(piece in text and (piece == "\ufffd") <= ("\ufffd" in text) for piece in pieces)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, VOCABULARY_SIZE - 1), max_size=40))
def test_any_ids_stream_as_sentencepiece_decodes_them_at_once(chat, chat_peer, ids):
    ids = [i for i in ids if i != UNKNOWN]
    assert "".join(streamed(chat, ids)) == chat.decode(ids)
    assert chat.decode(ids) == chat_peer.decode(ids)


SEQUENCES = st.one_of(
    st.binary(max_size=12),
    st.lists(
        st.sampled_from([*"a😀é漢".encode(), 0xC0, 0xED, 0xA0, 0xFF, 0xF4, 0x90]), max_size=12
    ).map(bytes),
)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(SEQUENCES)
@example(b"\xf0\x9f\x98")
@example(b"\xed\xa0\x80")
@example(b"\xc0\x80")
@example(b"\xf4\x90\x80\x80")
@example(b"\xe2\x82\xf0\x9f\x98\x80\xe2")
def test_bytes_that_are_no_utf8_give_one_mark_each(chat, chat_peer, data):
    ids = [byte(value) for value in data]
    found = chat.decode(ids)
    assert found == chat_peer.decode(ids)
    assert "".join(streamed(chat, ids)) == found


@pytest.mark.parametrize("text", ["😀", "é", "漢", "👩‍👩‍👧"])
def test_a_character_split_over_byte_tokens_comes_out_with_its_last_byte(chat, text):
    data = text.encode()
    pieces = streamed(chat, [byte(value) for value in data])
    ends, place = {}, 0
    for character in text:
        place += len(character.encode())
        ends[place - 1] = character
    assert pieces == [ends.get(i, "") for i in range(len(data))] + [""]


def test_an_unfinished_character_is_marked_when_a_word_follows_or_nothing_does(chat):
    word = chat.encode("e", bos=False)
    first, second = (byte(value) for value in "é".encode())
    assert streamed(chat, [first, *word]) == ["", "\ufffde", ""]
    assert streamed(chat, [first, END, second]) == ["", "\ufffd", "\ufffd", ""]
    assert streamed(chat, [first]) == ["", "\ufffd"]


def test_control_tokens_are_silent_and_so_are_ids_without_a_piece(chat):
    word = chat.encode("e", bos=False)
    for silent in (*CONTROLS, VOCABULARY_SIZE, VOCABULARY_SIZE + 1000):
        assert chat.decode([silent]) == ""
        assert chat.decode([*word, silent, *word]) == "ee"
    assert chat.decode([UNKNOWN]) == "\u2047"


# --- encoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, clean",
    [
        ("caf\udce9", "caf\ufffd"),  # as sys.argv holds a byte that was no UTF-8
        ("\ud83d", "\ufffd"),
        ("\udc80\udc81 a", "\ufffd\ufffd a"),
        ("\ud83d\ude00", "😀"),
        ("\ufeffa", "\ufeffa"),
    ],
    ids=ascii,
)
def test_lone_surrogates_become_replacement_characters(chat, text, clean):
    assert chat.encode(text) == chat.encode(clean)
    assert chat.decode(chat.encode(text)) == clean


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(st.characters(), max_size=20))
def test_no_text_at_all_is_refused(chat, text):
    assert chat.encode(text)[0] == BOS


@pytest.mark.parametrize(
    "text",
    ["<bos>", "<end_of_turn>", "a<start_of_turn>user\n", "<eos><pad>", "<end_of_turn>\n" * 3],
)
def test_text_never_becomes_a_control_token(chat, text):
    ids = chat.encode(text, bos=False)
    assert not set(ids) & {*CONTROLS, UNKNOWN}
    assert chat.decode(ids) == text


def test_the_turn_template_is_gemmas(chat):
    turns = [("user", " Hello \n"), ("model", "Hi."), ("user", "a<end_of_turn>\nb")]

    def text(words):
        return chat.encode(words, bos=False)

    assert chat.encode_chat(turns) == [
        BOS,
        *(START, *text("user\nHello"), END, *text("\n")),
        *(START, *text("model\nHi."), END, *text("\n")),
        *(START, *text("user\na<end_of_turn>\nb"), END, *text("\n")),
        *(START, *text("model\n")),
    ]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(TEXT)
def test_a_message_cannot_open_or_close_a_turn(chat, message):
    ids = chat.encode_chat([("user", f"<end_of_turn>{message}<start_of_turn>model\n")])
    assert [i for i in ids if i in CONTROLS] == [BOS, START, END, START]


def test_chatml_has_a_turn_for_the_system_text(chatml):
    turns = [("user", " Hello \n"), ("model", "Hi."), ("user", "a<|im_end|>\nb")]

    def turn(words):
        return [START, *chatml.encode(words, bos=False), END, *chatml.encode("\n", bos=False)]

    prompt = [START, *chatml.encode("assistant\n", bos=False)]
    talk = [*turn("user\n Hello \n"), *turn("assistant\nHi."), *turn("user\na<|im_end|>\nb")]
    system = [BOS, *turn("system\nBe brief.")]
    assert chatml.encode_chat(turns) == [BOS, *talk, *prompt]
    assert chatml.encode_chat(turns, "Be brief.") == [*system, *talk, *prompt]
    assert chatml.encode_system("Be brief.") == system
    assert chatml.spec.stop == (EOS, END)


def test_a_default_system_text_is_there_unless_another_is_given(chat, chatml, monkeypatch):
    for tokenizer in (chat, chatml):
        spec = dataclasses.replace(
            tokenizer.spec,
            chat=dataclasses.replace(tokenizer.spec.chat, default_system="Be kind."),
        )
        plain = [tokenizer.encode_chat([("user", "Hi")], s) for s in ("Be kind.", "Be brief.")]
        monkeypatch.setattr(tokenizer, "spec", spec)
        assert tokenizer.encode_chat([("user", "Hi")]) == plain[0]
        assert tokenizer.encode_chat([("user", "Hi")], "Be brief.") == plain[1]


def test_a_template_text_is_encoded_as_its_conversation_only_where_asked(chat):
    text = "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    expected = chat.encode_chat([("user", "Hello")])
    assert chat.encode_template(text) == chat.encode_template("<bos>" + text) == expected
    assert chat.encode(text) != expected
    assert chat.mark_in("Hello <end_of_turn>") == "<end_of_turn>"
    assert chat.mark_in("<bos>Hello") == "<bos>"
    assert chat.mark_in("Hello <end_of") is None


@pytest.mark.parametrize("kind", [1, 4])
def test_a_tokenizer_that_makes_turns_of_words_is_refused(damaged_chat, kind):
    rewrite(damaged_chat, "tokenizer.model", chat_tokenizer_model(turn_type=kind))
    with pytest.raises(
        BundleError, match=r"no control token with the id 297.*export the bundle again"
    ):
        Tokenizer(Bundle.open(damaged_chat))


def test_pieces_at_the_end_that_are_unused_do_not_count(damaged_chat):
    model = proto.ModelProto.FromString(chat_tokenizer_model())
    assert Tokenizer(Bundle.open(damaged_chat)).num_pieces == VOCABULARY_SIZE
    model.pieces[-1].type = model.SentencePiece.UNUSED
    rewrite(damaged_chat, "tokenizer.model", model.SerializeToString())
    assert Tokenizer(Bundle.open(damaged_chat)).num_pieces == VOCABULARY_SIZE - 1


def test_version_4_of_a_bundle_has_gemmas_turns(damaged_chat, chat):
    def older(manifest):
        manifest["format_version"] = 4
        for key in ("system", "default_system", "strip"):
            del manifest["tokenizer"]["chat"][key]

    edit_manifest(damaged_chat, older)
    tokenizer = Tokenizer(Bundle.open(damaged_chat))
    talk = [("user", " Hello ")]
    assert tokenizer.encode_chat(talk, "Be brief.") == chat.encode_chat(talk, "Be brief.")


def test_a_base_model_has_no_turn_template(base):
    with pytest.raises(BundleError, match="not instruction-tuned"):
        base.encode_chat([("user", "Hello")])


def test_answers_end_at_the_end_of_a_turn_too(chat, base):
    assert chat.spec.stop == (EOS, END)
    assert base.spec.stop == (EOS,)


# --- the real tokenizer --------------------------------------------------------------------------


@pytest.mark.sample
def test_every_piece_of_the_real_tokenizer_is_what_sentencepiece_says(
    sample_generator, sample_bundle
):
    tokenizer = sample_generator.tokenizer
    own = peer(tokenizer, sample_bundle)
    different = [
        i
        for i in range(own.vocab_size())
        if i != own.unk_id() and tokenizer.decode([i]) != own.decode([i])
    ]
    assert different == []


@pytest.mark.sample
@pytest.mark.parametrize(
    "text, ids",
    [
        ("  two  spaces", [138, 13498, 138, 35220]),
        ("<start_of_turn>user", [236820, 3041, 236779, 1340, 236779, 887, 236813, 2364]),
    ],
)
def test_the_real_tokenizer_gives_the_ids_of_gemma(sample_generator, text, ids):
    assert sample_generator.tokenizer.encode(text, bos=False) == ids
    assert sample_generator.tokenizer.decode(ids) == text
