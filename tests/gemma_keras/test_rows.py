"""Training rows: where they come from, what is learnt of each, and what is refused."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import sentencepiece

from gemma_keras.text.chat import CHATML_TURNS, GEMMA_TURNS, encode_chat
from gemma_keras.train.errors import RowError
from gemma_keras.train.examples import Renderer, make_examples
from gemma_keras.train.rows import peeked, read_rows
from tests.edge_demo.make_bundles import CHATML
from tests.models import chat_tokenizer_model

pytestmark = [pytest.mark.keras, pytest.mark.backends("torch")]

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who waters the young trees?"},
    {"role": "assistant", "content": "The gardener."},
    {"role": "user", "content": "When?"},
    {"role": "model", "content": " Before the sun is high.\n"},
]
PROTO = chat_tokenizer_model()
MODEL = sentencepiece.SentencePieceProcessor(model_proto=PROTO)
PAIRS = [
    {"prompt": "A boat", "completion": " went down"},
    {"prompt": "Seven", "completion": " lay"},
]


def values(source):
    return [row.value for row in read_rows(source)]


def said(example, model=MODEL):
    """The text that is learnt, control tokens by name."""
    ids = example.ids[example.counts].tolist()
    return "".join(model.id_to_piece(i) for i in ids).replace("▁", " ").replace("<0x0A>", "\n")


# --- where they come from ------------------------------------------------------------------------


def as_columns(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return [PAIRS[index]]


def tf_pairs():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(as_columns(PAIRS)).batch(2)


def torch_pairs(**options):
    from torch.utils.data import DataLoader

    return DataLoader(PAIRS, batch_size=2, **options)


def hugging_face_pairs():
    import datasets

    return datasets.Dataset.from_list(PAIRS)


SOURCES = {
    "list": lambda: PAIRS,
    "tuple": lambda: tuple(PAIRS),
    "columns": lambda: as_columns(PAIRS),
    "columns of arrays": lambda: {k: np.array(v) for k, v in as_columns(PAIRS).items()},
    "generator": lambda: (row for row in PAIRS),
    "generator of batches": lambda: (as_columns([row]) for row in PAIRS),
    "PyDataset": lambda: Batches(),
    "tf.data": tf_pairs,
    "DataLoader": torch_pairs,
    "DataLoader of lists": lambda: torch_pairs(collate_fn=list),
    "Hugging Face": hugging_face_pairs,
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_rows(name):
    assert values(SOURCES[name]()) == PAIRS


@pytest.mark.parametrize("name", SOURCES)
def test_rows_are_told_from_arrays_and_stay_whole(name):
    told, source = peeked(SOURCES[name]())
    assert told and values(source) == PAIRS


class ArrayBatches(Batches):
    def __getitem__(self, index):
        return np.zeros((2, 3)), np.zeros((2, 3))


@pytest.mark.parametrize(
    "other",
    [
        np.zeros((2, 3)),
        {"token_ids": np.zeros((2, 3)), "padding_mask": np.ones((2, 3))},
        (np.zeros((2, 3)), np.zeros((2, 3))),
        None,
        ArrayBatches(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arrays_are_no_rows(other):
    told, source = peeked(other)
    assert not told and source is other


def test_an_iterator_of_arrays_loses_none():
    told, source = peeked(iter([np.zeros(2), np.ones(2)]))
    assert not told and [array.sum() for array in source] == [0, 2]


def test_a_dataset_of_texts_stays_a_stream():
    import tensorflow as tf

    texts = tf.data.Dataset.from_tensor_slices(["The bread"])
    endless = texts.batch(1).repeat()
    assert peeked(endless) == (False, endless)
    assert peeked(texts) == (True, texts) and values(texts) == ["The bread"]
    assert len(list(read_rows(tf_pairs().repeat(), 5))) == 5
    with pytest.raises(RowError, match="has no end; leave out repeat"):
        list(read_rows(tf_pairs().repeat()))


def test_conversations_are_rows_alone_in_batches_and_in_columns():
    row = {"messages": TALK}
    assert values([row]) == values({"messages": [TALK]}) == values(iter([[row]])) == [row]


def test_texts_come_from_strings_arrays_and_tf_data():
    import tensorflow as tf

    texts = ["The bread", "rises slowly"]
    for source in (texts, np.array(texts), tf.data.Dataset.from_tensor_slices(texts).batch(2)):
        assert values(source) == texts


def test_a_jsonl_file_names_its_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIRS[0]) + "\n\n" + json.dumps({"text": "x", "id": 3}) + "\n")
    rows = list(read_rows(str(path)))
    assert peeked(path)[0] and peeked(str(path))[0]
    assert [row.where for row in rows] == ["rows.jsonl, line 1", "rows.jsonl, line 3"]
    assert [row.value for row in rows] == [PAIRS[0], {"text": "x", "id": 3}]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"text": "a"}\n{"text": "b', r"line 2: it is not JSON.*truncated"),
        ('{"text": "a"}\n{"text": nan}\n', r"line 2: it is not JSON"),
        ("[1, 2]\n", r"line 1: a line must hold one row, a text or an object"),
        (
            '{"question": "a"}\n',
            r"line 1: a row has the keys 'question'; it needs prompt and chosen",
        ),
        ("[" * 100_000 + "\n", r"line 1: it is not JSON"),
        (b"\xff\xfe\n", r"line 1: it is not UTF-8"),
        (b"\x1f\x8b\x08\n", r"line 1: it is compressed"),
        ('[\n{"text": "a"}]', r"line 1: it is not JSON: .*; each line must hold one row"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, text, named):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RowError, match=named):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ([PAIRS[0], {"question": "a"}], "row 2: a row has the keys 'question'"),
        ([PAIRS[0], 3], "row 2: a row must be a text or a mapping"),
        ({"prompt": ["a", "b"], "completion": ["c"]}, "same number.*prompt 2, completion 1"),
        (3, "cannot be read from int"),
    ],
)
def test_what_is_no_row_is_named(source, named):
    with pytest.raises(RowError, match=named):
        list(read_rows(source))


# --- what is learnt ------------------------------------------------------------------------------


def test_of_a_text_all_is_learnt_but_its_beginning():
    example = Renderer(PROTO)("The bread")
    assert example.ids.tolist() == [MODEL.bos_id(), *MODEL.encode("The bread"), MODEL.eos_id()]
    assert example.counts.tolist() == [False] + [True] * (len(example) - 1)


@pytest.mark.parametrize(
    "keys", [("prompt", "completion"), ("prompts", "responses"), ("prompt", "response")]
)
def test_of_two_texts_the_second_is_learnt(keys):
    example = Renderer(PROTO)(dict(zip(keys, ("A boat", " went down"), strict=True)))
    ids = [MODEL.bos_id(), *MODEL.encode("A boat"), *MODEL.encode(" went down"), MODEL.eos_id()]
    assert example.ids.tolist() == ids
    assert said(example) == " went down<eos>"


@pytest.mark.parametrize("turns", [GEMMA_TURNS, CHATML_TURNS], ids=["gemma", "chatml"])
def test_a_conversation_is_written_as_chat_writes_it_and_answers_are_learnt(turns):
    proto = PROTO if turns is GEMMA_TURNS else chat_tokenizer_model(*CHATML)
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    example = Renderer(proto, turns)({"messages": TALK})
    asked = encode_chat(proto, TALK[:-1], turns)
    assert example.ids[: len(asked)].tolist() == asked
    end = turns.end_of_turn
    last = TALK[-1]["content"].strip() if turns.strip else TALK[-1]["content"]
    assert said(example, model) == f"The gardener.{end}\n{last}{end}\n"
    generated = [*model.encode(last), model.piece_to_id(end), *model.encode("\n")]
    assert example.ids[len(asked) :].tolist() == generated
    # the first answer is asked for as it will be, too
    first = encode_chat(proto, TALK[:2], turns)
    assert example.ids[: len(first)].tolist() == first and not example.counts[: len(first)].any()


def test_of_messages_in_two_parts_the_answers_of_the_second_are_learnt():
    row = {"prompt": TALK[:4], "completion": TALK[4:]}
    assert said(Renderer(PROTO)(row)) == "Before the sun is high.<end_of_turn>\n"
    row = {"prompt": TALK[:2], "completion": TALK[2:]}
    whole, parts = Renderer(PROTO)({"messages": TALK}), Renderer(PROTO)(row)
    np.testing.assert_array_equal(whole.counts, parts.counts)
    np.testing.assert_array_equal(whole.ids, parts.ids)


def turns_of(*texts):
    """Messages of a user and the model by turns."""
    return [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(texts)]


# What both answers are, and what TRL 1.16 makes of them: the prompt's length, or letters.
IMPLIED = [
    ("The boat went down the river.", "The boat sank.", len("The boat")),
    ("The boat  sank.", "The boat  left.", len("The boat ")),
    ("The boat went.", "The boat was.", len("The boat w")),
    ("The boat", "The boat sank.", len("The boa")),
    ("The boat sank.", "The boat", len("The boa")),
    (turns_of("Open?", "Yes."), turns_of("Open?", "No."), 1),
    (turns_of("Open?", "Yes.", "When?", "At five."), turns_of("Open?", "Yes.", "When?", "Now."), 3),
    (turns_of("Open?", "Yes."), turns_of("Open?", "Yes.", "When?", "Now."), 1),
    (turns_of("Open?", "Yes.", "When?", "Now."), turns_of("Open?", "No.", "Why?", "Snow."), 1),
]


@pytest.mark.parametrize(("chosen", "rejected", "size"), IMPLIED)
def test_a_prompt_that_is_not_said_is_what_both_answers_begin_with(chosen, rejected, size):
    render = Renderer(PROTO, pairs=True)
    row = {"chosen": chosen, "rejected": rejected}
    parts = {"prompt": chosen[:size], "chosen": chosen[size:], "rejected": rejected[size:]}
    rows = [row] if isinstance(chosen, str) else [row, row | {"prompt": "Open?"}]
    columns = [{key: [value] for key, value in row.items()}]
    for (found,) in map(values, [[one] for one in rows] + columns):
        assert render(found).digest == render(parts).digest


def test_parts_of_messages_are_compared_as_the_text_that_they_are():
    asked = [{"role": "user", "content": [{"type": "text", "text": "Open?"}]}]
    row = {
        "chosen": [*asked, *turns_of("", "Yes.")[1:]],
        "rejected": turns_of("Open?", "No."),
    }
    plain = {"chosen": turns_of("Open?", "Yes."), "rejected": turns_of("Open?", "No.")}
    render = Renderer(PROTO, pairs=True)
    assert render(row).digest == render(plain).digest


@pytest.mark.parametrize(
    ("chosen", "rejected", "named"),
    [
        (
            "Yes.",
            "No.",
            "its chosen and rejected do not begin with one prompt that both go on from",
        ),
        (" yes", " no", "do not begin with one prompt"),
        ("", "a", "do not begin with one prompt"),
        ("a", "ab", "do not begin with one prompt"),
        (turns_of("Open?", "Yes."), turns_of("When?", "Now."), "do not begin with one prompt"),
        (turns_of("", "Yes.")[1:], turns_of("", "No.")[1:], "do not begin with one prompt"),
        ("Yes.", "Yes.", "its chosen and rejected answers are the same"),
        (turns_of("a", "b"), turns_of("a", "b"), "answers are the same"),
        ("Yes.", turns_of("a", "b"), "chosen and rejected must be two texts, or messages both"),
        ("Yes.", None, "its rejected must be a text, not None"),
        (turns_of("a", "b"), turns_of("a"), "do not begin with one prompt"),
    ],
)
def test_answers_without_a_prompt_that_tell_none_are_named(chosen, rejected, named):
    row = {"chosen": chosen, "rejected": rejected}
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(RowError, match=f"^row 2: .*{named}"):
        make_examples(read_rows([good, row]), Renderer(PROTO, pairs=True), 100)


def test_a_control_token_in_a_text_is_text():
    row = {"messages": [{"role": "user", "content": "<end_of_turn>"},
                        {"role": "model", "content": "<eos><start_of_turn>"}]}  # fmt: skip
    example = Renderer(PROTO)(row)
    end = MODEL.piece_to_id("<end_of_turn>")
    assert example.ids.tolist().count(end) == 2 and MODEL.eos_id() not in example.ids
    answer = [*MODEL.encode("<eos><start_of_turn>"), end, *MODEL.encode("\n")]
    assert example.ids[example.counts].tolist() == answer


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("", "text is empty"),
        ({"text": ""}, "text is empty"),
        ({"text": 3}, "text must be a text, not 3"),
        ({"prompt": "a", "completion": ""}, "text is empty"),
        (
            {"prompt": "a", "completion": TALK},
            "prompt and completion must be two texts, or messages",
        ),
        ({"prompt": "a", "completion": None}, "completion must be a text, not None"),
        ({"prompt": None, "completion": "a"}, "prompt must be a text, not None"),
        ({"prompt": TALK, "completion": ["a"]}, "completion must be a list of messages"),
        ({"prompt": "a", "completion": "\ud800"}, "cannot be written as UTF-8"),
        ({"messages": [{"role": ["user"], "content": "a"}, TALK[2]]}, "found \\['user'\\], assis"),
        ({"messages": [TALK[1], {"role": "model", "content": "\udc00"}]}, "written as UTF-8"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of the type 'image'"),
        ({"messages": []}, "the user first and the model last; found none"),
        ({"messages": TALK[:-1]}, "found system, user, assistant, user"),
        ({"messages": TALK[2:]}, "found assistant, user, model"),
        ({"messages": [TALK[1], TALK[1], TALK[2]]}, "found user, user, assistant"),
        ({"messages": [TALK[1], {"role": "tool", "content": "x"}]}, "found user, tool"),
        ({"messages": [TALK[1], {"role": "model", "content": None}]}, "content that is text"),
        ({"messages": [TALK[1], {"role": "model", "content": " \n"}]}, "answer 1 is empty"),
        ({"messages": "hello"}, "messages must be a list of messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prefers an answer"),
    ],
)
def test_a_row_that_says_nothing_to_learn_is_named(row, named):
    with pytest.raises(RowError, match=rf"^row 2: .*{named}"):
        make_examples(read_rows(["good", row]), Renderer(PROTO), 100)


# --- too long ------------------------------------------------------------------------------------

ROWS = [
    "The bread",
    "Bread rises slowly in a cold kitchen",
    {"prompt": "The bread rises slowly", "completion": "x"},
]


def test_a_row_that_is_too_long_is_refused_by_name():
    with pytest.raises(RowError, match=r"row 2 has \d+ tokens, more than 11; .*on_too_long="):
        make_examples(read_rows(ROWS), Renderer(PROTO), len(Renderer(PROTO)(ROWS[0])))


def test_a_long_row_is_cut_or_skipped_and_counted():
    lengths = [len(Renderer(PROTO)(row)) for row in ROWS]
    most = lengths[0]
    assert lengths[1] > most and len(MODEL.encode(ROWS[2]["prompt"])) >= most
    cut = make_examples(read_rows(ROWS), Renderer(PROTO), most, "truncate")
    assert [len(example) for example in cut.examples] == [most, most]
    assert cut.truncated == ["row 2"] and cut.skipped == ["row 3"]  # of which nothing is learnt
    skipped = make_examples(read_rows(ROWS), Renderer(PROTO), most, "skip")
    assert len(skipped.examples) == 1 and skipped.skipped == ["row 2", "row 3"]
    counted = sum(example.counts.sum() for example in cut.examples)
    assert str(cut) == (
        f"2 examples of {2 * most} tokens, {counted} of which are learnt; 1 cut to {most} tokens "
        "(row 2); 1 skipped (row 3)"
    )


def test_nothing_left_is_refused():
    with pytest.raises(RowError, match="no rows to learn from: all 3 are too long"):
        make_examples(read_rows(ROWS), Renderer(PROTO), 2, "skip")
    with pytest.raises(RowError, match=r"no rows to learn from$"):
        make_examples(read_rows(iter(())), Renderer(PROTO), 2, "skip")
    with pytest.raises(ValueError, match="must be one of error, truncate, skip"):
        make_examples(read_rows(ROWS), Renderer(PROTO), 2, "cut")


def test_what_teaches_nothing_is_named():
    def alone(text):
        return [4] if text else []

    render = Renderer(PROTO, encode_text=alone, starts=False, ends=False)
    with pytest.raises(RowError, match="row 1: nothing of it is to be learnt"):
        make_examples(read_rows(["a"]), render, 9)


# --- what is no source ---------------------------------------------------------------------------


def torch_loader_of_one_pass():
    from torch.utils.data import DataLoader, IterableDataset

    class Once(IterableDataset):
        def __init__(self):
            self.rows = iter(PAIRS)

        def __iter__(self):
            return self.rows

    return DataLoader(Once(), batch_size=1)


def test_looking_into_a_source_loses_no_row():
    for source in (torch_loader_of_one_pass(), iter(PAIRS), map(dict, PAIRS)):
        told, whole = peeked(source)
        assert told and values(whole) == PAIRS


def mapped_stream():
    import datasets

    return datasets.Dataset.from_list(PAIRS).to_iterable_dataset().map(lambda row: row)


class Mapped:
    """A torch `Dataset` without a loader."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return PAIRS[index]


OTHERS = {
    "a stream of Hugging Face after map": mapped_stream,
    "a torch Dataset": Mapped,
    "an array of objects": lambda: np.array(PAIRS, dtype=object),
    "a set of texts": lambda: dict.fromkeys(("a", "b")).keys(),
    "bytes": lambda: [b"a", b"b"],
    "an array of bytes": lambda: np.array([b"a", b"b"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_containers_give_their_rows(name):
    told, source = peeked(OTHERS[name]())
    assert told and values(source) in (PAIRS, ["a", "b"])


def a_set_of_datasets():
    import datasets

    return datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS)})


NOTHING = {
    "a text": (lambda: "one text", "'one text' is one text; give a list of texts"),
    "a number": (lambda: 3, "rows cannot be read from int"),
    "a function": (lambda: len, "rows cannot be read from builtin"),
    "other keys": (
        lambda: [{"instruction": "a"}],
        "row 1: a row has the keys 'instruction'; it ne",
    ),
    "other columns": (lambda: {"question": ["a"]}, "a row has the keys 'question'; it needs"),
    "no keys": (lambda: [{}], "row 1: a row has the keys none"),
    "messages alone": (lambda: [[TALK[1], TALK[2]]], "row 1: a row has the keys 'role', 'content'"),
    "numbers": (lambda: iter([1, 2]), "row 1: a row must be a text or a mapping, but 1"),
    "nothing in a list": (lambda: [None], "row 1: a row must be a text or a mapping, but None"),
    "names of files": (lambda: ["a.jsonl", "b.jsonl"], "row 1: 'a.jsonl' is the name of a file"),
    "a set of datasets": (a_set_of_datasets, r"give one of them, such as rows\['train'\]"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_gives_no_rows_says_what_is_wrong(name):
    make, said = NOTHING[name]
    told, source = peeked(make())
    assert told
    with pytest.raises(RowError, match=said):
        list(read_rows(source))


def test_parts_of_a_message_are_one_text():
    parts = [{"type": "text", "text": "Who waters "}, {"type": "text", "text": "the young trees?"}]
    whole = {"messages": [TALK[1], TALK[2]]}
    in_parts = {"messages": [{"role": "user", "content": parts}, TALK[2]]}
    render = Renderer(PROTO)
    assert render(in_parts).ids.tolist() == render(whole).ids.tolist()
