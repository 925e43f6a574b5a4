"""`fit` and `evaluate` on rows: what is learnt, what is shown, what is refused."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaBackbone, GemmaCausalLM
from gemma_keras.text.chat import encode_chat
from gemma_keras.tokenizer import GemmaCausalLMPreprocessor, GemmaTokenizer
from gemma_keras.train.errors import RowError
from gemma_keras.train.fit import read_examples
from tests.models import TEXT, chat_tokenizer_model, write_tiny_chat

pytestmark = pytest.mark.keras

LINES = TEXT.splitlines()
PAIRS = [
    {"prompt": "The boat", "completion": " went down the river."},
    {"prompt": "Seven stones", "completion": " lay on the table; she counted them."},
    {"prompt": "Bread", "completion": " rises."},
]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": "Who waters the trees?"},
            {"role": "assistant", "content": "The gardener does."},
            {"role": "user", "content": "When?"},
            {"role": "assistant", "content": "Before the sun is high."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Is the shop open?"},
            {"role": "assistant", "content": "It closes at five."},
        ]
    },
]
ROWS = [*PAIRS, *TALKS]
LENGTH = 112


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("rows"))


def load(folder, optimizer=None, **options):
    keras.utils.set_random_seed(0)
    options = {"dtype": "float32", "sequence_length": LENGTH, "instruction_tuned": True} | options
    model = GemmaCausalLM.from_preset(folder, **options)
    model.compile(optimizer=optimizer or keras.optimizers.Adam(3e-3))
    return model


def by_hand(model, rows, encode=None):
    """Cross-entropy in nats of each token that counts, each row alone, in float64."""
    losses = []
    for row in rows:
        (example,) = read_examples(model, [row]).examples
        logits = model.logits(example.ids[None, :-1])[0].astype("float64")
        mass = np.log(np.exp(logits).sum(-1))
        chosen = np.take_along_axis(logits, example.ids[1:, None], -1)[:, 0]
        losses.extend((mass - chosen)[example.counts[1:]])
    return np.array(losses)


def evaluated(model, rows, **options):
    return model.evaluate(rows, verbose=0, return_dict=True, **options)


# --- what is shown -------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_loss_is_nats_per_token_that_counts_whatever_the_batches(folder, batch_size, packed):
    model = load(folder)
    losses = by_hand(model, ROWS)
    found = evaluated(model, ROWS, batch_size=batch_size, pack=packed)
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-4)
    assert 0 <= found["sparse_categorical_accuracy"] <= 1
    assert set(found) == {"loss", "perplexity", "sparse_categorical_accuracy"}


def test_fit_shows_the_same_as_evaluate(folder):
    model = load(folder, keras.optimizers.SGD(0.0))
    losses = by_hand(model, ROWS)
    history = model.fit(ROWS, batch_size=2, validation_data=ROWS, epochs=2, verbose=0).history
    for name in ("loss", "val_loss"):
        assert history[name] == pytest.approx([losses.mean()] * 2, rel=1e-5)
    assert history["val_perplexity"] == pytest.approx([np.exp(losses.mean())] * 2, rel=1e-4)


@pytest.mark.backends("torch")
def test_accumulated_gradients_show_the_same_and_are_those_of_one_large_batch(folder):
    after = {}
    for steps, batch_size in ((None, 4), (2, 2)):
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps)
        model = load(folder, optimizer)
        history = model.fit(ROWS[:4], batch_size=batch_size, shuffle=False, verbose=0).history
        after[steps] = history["loss"], dict(model.backbone.weight_source())
    assert after[2][0] == pytest.approx(after[None][0], rel=1e-5)
    start = load(folder).backbone.weight_source()
    for name, weight in after[None][1].items():
        moved = np.abs(weight - start[name]).max()
        assert moved > 0 and np.abs(after[2][1][name] - weight).max() < 1e-4 * moved, name


@pytest.mark.backends("torch")
def test_accumulated_batches_of_a_loss_of_the_users_own_are_not_weighed(folder):
    """It does not divide by the tokens that count, so their number must not come in twice."""
    seen = []

    class Mine(keras.losses.Loss):
        def __call__(self, y_true, y_pred, sample_weight=None):
            seen.extend(np.unique(ops.convert_to_numpy(sample_weight)))
            return ops.mean(y_pred) * 0

    model = load(folder)
    optimizer = keras.optimizers.SGD(0.0, gradient_accumulation_steps=2)
    model.compile(optimizer=optimizer, loss=Mine(), weighted_metrics=None)
    model.fit(ROWS[:4], batch_size=1, verbose=0)
    assert set(seen) == {0.0, 1.0}


@pytest.mark.backends("torch")
def test_metrics_of_the_users_own_get_logits(folder):
    model = load(folder)
    own = keras.metrics.SparseCategoricalAccuracy(name="mine")
    model.compile(optimizer=keras.optimizers.SGD(0.0), weighted_metrics=[own])
    found = evaluated(model, ROWS, batch_size=2)
    assert found["loss"] == pytest.approx(by_hand(model, ROWS).mean(), rel=1e-5)
    model.compile(optimizer=keras.optimizers.SGD(0.0), metrics=["accuracy"])
    others = evaluated(model, ROWS, batch_size=2)
    assert others["sparse_categorical_accuracy"] == pytest.approx(found["mine"])
    assert set(found) == {"loss", "mine"} and "accuracy" in others and "perplexity" in others


def test_what_was_cut_is_shown_before_training(folder, capsys):
    model = load(folder, sequence_length=24)
    model.fit(ROWS, epochs=1, verbose=2)
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("3 examples of ") and " of which are learnt; " in said
    # the beginning of a conversation is not learnt, so that nothing is left of two
    assert "2 cut to 25 tokens (row 1, row 2); 2 skipped (row 4, row 5)" in said
    short = {"prompt": "A", "completion": "boat"}
    rows = [*ROWS, short, short, short]
    model.fit(rows, verbose=2, on_too_long="skip", pack=True, validation_split=0.5)
    said = capsys.readouterr().out.splitlines()[0]
    assert "4 skipped (row 1, row 2, row 4 and 1 more)" in said
    assert said.endswith("; the last 2 examples are held out; packed into 1 rows")
    with pytest.raises(RowError, match=r"row \d has \d+ tokens, more than 25; give a larger"):
        model.fit(ROWS, verbose=0, on_too_long="error")
    model.fit(ROWS, verbose=0)
    assert not capsys.readouterr().out


@pytest.mark.backends("torch")
def test_evaluate_is_told_what_becomes_of_long_rows(folder):
    model = load(folder, sequence_length=24)
    short = evaluated(model, PAIRS[2:])
    assert evaluated(model, [PAIRS[1], PAIRS[2]], on_too_long="skip") == short
    with pytest.raises(RowError, match="row 1 has 47 tokens"):
        evaluated(model, [PAIRS[1], PAIRS[2]], on_too_long="error")


@pytest.mark.backends("torch")
def test_a_call_gives_logits_also_in_training(folder):
    model = load(folder)
    model.fit(PAIRS, verbose=0)
    ids = np.arange(4, 20, dtype="int32")[None]
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    expected = model.logits(ids)
    for options in ({}, {"training": True}, {"training": False, "mask": None}):
        found = ops.convert_to_numpy(model(inputs, **options))
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(ops.convert_to_numpy(model.call(inputs)), expected)


@pytest.mark.backends("torch")
def test_the_loss_can_be_computed_outside_of_fit(folder):
    model = load(folder)
    ids = np.random.default_rng(0).integers(4, 300, (2, 21)).astype("int32")
    x, y = {"token_ids": ids[:, :-1], "padding_mask": np.ones((2, 20), "int32")}, ids[:, 1:]
    weights = np.ones((2, 20), "float32")
    weights[1] = 0  # a weight of a row is one of each of its tokens
    found = [
        float(ops.convert_to_numpy(model.compute_loss(x, y, model(x), w, training=False)))
        for w in (weights, weights[:, 0], None)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6) and abs(found[2] - found[0]) > 1e-4


def rows_seen(model, **options):
    """The rows of each step, told by their loss; one row a step, and nothing is learnt."""
    found = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs: found.append(logs))
    model.fit(PAIRS, batch_size=1, verbose=0, callbacks=[note], **options)
    own = [by_hand(model, [row]) for row in PAIRS]
    seen, total, count = [], 0.0, 0
    steps = options.get("steps_per_epoch", len(PAIRS))
    for number, logs in enumerate(found):
        if number % steps == 0:
            total, count = 0.0, 0
        nearest = min(
            range(len(own)),
            key=lambda i: abs((total + own[i].sum()) / (count + own[i].size) - logs["loss"]),
        )
        total, count = total + own[nearest].sum(), count + own[nearest].size
        seen.append(nearest)
    return seen


@pytest.mark.parametrize("options", [{"epochs": 2}, {"epochs": 6, "steps_per_epoch": 1}], ids=str)
def test_each_row_is_seen_once_a_pass_however_long_an_epoch_is(folder, options):
    model = load(folder, keras.optimizers.SGD(0.0))
    seen = rows_seen(model, **options)
    assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2]


@pytest.mark.backends("torch")
@pytest.mark.parametrize("form", ["list", "file", "tf.data"])
def test_a_source_with_a_length_is_read_whole_however_few_the_steps_are(
    folder, form, tmp_path, capsys
):
    """Or a sorted list would show its beginning alone."""
    import tensorflow as tf

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    columns = {key: [row[key] for row in PAIRS] for key in PAIRS[0]}
    dataset = tf.data.Dataset.from_tensor_slices(columns)
    source = {"list": PAIRS, "file": tmp_path / "rows.jsonl", "tf.data": dataset}[form]
    load(folder).fit(source, steps_per_epoch=1, batch_size=1, verbose=2)
    assert capsys.readouterr().out.startswith("3 examples of")


@pytest.mark.backends("torch")
def test_a_source_without_an_end_is_read_as_far_as_steps_go(folder):
    import itertools

    model = load(folder, keras.optimizers.SGD(0.0))
    history = model.fit(itertools.cycle(PAIRS), steps_per_epoch=3, batch_size=1, verbose=0)
    expected = by_hand(model, PAIRS).mean()
    assert history.history["loss"] == pytest.approx([expected], rel=1e-5)


@pytest.mark.backends("torch")
def test_compiling_again_forgets_what_was_before(folder):
    model = load(folder)
    expected = evaluated(model, ROWS)
    model.compile(weighted_metrics=["accuracy"])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.compile()
    assert evaluated(model, ROWS) == expected
    assert model.evaluate(ROWS, verbose=0) == list(expected.values())
    with pytest.raises(ValueError, match="loss_weights is for several losses"):
        model.compile(loss_weights=2.0)
    model.compile(loss=None)
    with pytest.raises(ValueError, match="No loss to compute"):
        model.evaluate(ROWS, verbose=0)


@pytest.mark.backends("torch")
def test_a_loss_of_the_users_own_counts_no_row_that_is_not_there(folder):
    model = load(folder)
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="sum_over_batch_size"
    )
    model.compile(loss=loss)
    found = [evaluated(model, ROWS, batch_size=n)["loss"] for n in (1, 2, 5, 32)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)


@pytest.mark.backends("torch")
def test_a_loss_that_is_derived_counts(folder):
    from gemma_keras.model.losses import TokenLoss

    class Twice(TokenLoss):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    model = load(folder)
    expected = evaluated(model, ROWS[:1])["loss"]
    model.compile(loss=Twice())
    assert loss_of(model, *model_inputs(model)) == pytest.approx(2 * expected, rel=1e-5)


def loss_of(model, *arguments):
    return float(ops.convert_to_numpy(model.compute_loss(*arguments)))


def model_inputs(model):
    (example,) = read_examples(model, ROWS[:1]).examples
    ids = example.ids[None]
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, :-1])}
    weights = ops.convert_to_tensor(example.counts[None, 1:].astype("float32"))
    return x, ops.convert_to_tensor(ids[:, 1:]), model(x), weights


@pytest.mark.backends("torch")
def test_regularizers_count(folder):
    model = load(folder)
    arguments = model_inputs(model)
    before = loss_of(model, *arguments)
    layer = model.backbone.layer_norm
    layer.scale.regularizer = keras.regularizers.L2(1.0)
    added = float(np.square(ops.convert_to_numpy(layer.scale)).sum())
    assert loss_of(model, *arguments) == pytest.approx(before + added, rel=1e-5)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("name", ["loss", "perplexity", "sparse_categorical_accuracy"])
def test_a_callback_knows_which_way_is_better(folder, name):
    stop = keras.callbacks.EarlyStopping(f"val_{name}", patience=1)
    model = load(folder, keras.optimizers.SGD(0.0))
    history = model.fit(PAIRS, validation_data=PAIRS, epochs=5, callbacks=[stop], verbose=0).history
    assert len(history["loss"]) == 2  # nothing gets better
    assert (stop.monitor_op(2, 1)) == (name == "sparse_categorical_accuracy")


# --- what is learnt ------------------------------------------------------------------------------


def test_answers_are_learnt_in_the_template_that_chat_writes(folder):
    model = load(folder, keras.optimizers.Adam(1e-2))
    before = by_hand(model, TALKS).mean()
    model.fit(TALKS, epochs=40, verbose=0)
    assert by_hand(model, TALKS).mean() < 0.2 * before
    asked = TALKS[1]["messages"][:1]
    answer = model.chat(asked)
    assert answer == TALKS[1]["messages"][1]["content"]
    proto = model.preprocessor.tokenizer.proto
    (example,) = read_examples(model, [TALKS[1]]).examples
    prompt = encode_chat(proto, asked, model.turns)
    assert example.ids[: len(prompt)].tolist() == prompt


def test_texts_are_learnt_as_keras_hub_packs_them(folder):
    """The same tokens with its preprocessor and ours, and so the same loss and gradients."""
    ours, theirs = load(folder, keras.optimizers.SGD(0.1)), load(folder, keras.optimizers.SGD(0.1))
    found = ours.fit(LINES, batch_size=4, shuffle=False, verbose=0).history
    x, y, weights = theirs.preprocessor(LINES)
    x, y, weights = keras.tree.map_structure(np.asarray, (x, y, weights))
    theirs.preprocessor = None
    shown = theirs.evaluate(x, y, sample_weight=weights, batch_size=3, verbose=0, return_dict=True)
    assert shown["loss"] == pytest.approx(evaluated(load(folder), LINES)["loss"], rel=1e-5)
    expected = theirs.fit(x, y, sample_weight=weights, batch_size=4, shuffle=False, verbose=0)
    assert found["loss"] == pytest.approx(expected.history["loss"], rel=1e-5)
    start = load(folder).backbone.weight_source()
    others = theirs.backbone.weight_source()
    for name, weight in ours.backbone.weight_source().items():
        moved = np.abs(weight - start[name]).max()
        assert np.abs(others[name] - weight).max() < 1e-3 * moved, name


@pytest.mark.backends("torch")
def test_the_same_seed_gives_the_same_order(folder):
    def losses():
        return load(folder).fit(ROWS, batch_size=1, epochs=2, verbose=0).history["loss"]

    assert losses() == losses()


@pytest.mark.backends("torch")
def test_rows_come_from_a_file_and_from_tf_data(folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    import tensorflow as tf

    model = load(folder)
    expected = evaluated(model, PAIRS)
    columns = {key: [row[key] for row in PAIRS] for key in PAIRS[0]}
    for source in (path, str(path), tf.data.Dataset.from_tensor_slices(columns)):
        assert evaluated(model, source) == expected
    texts = tf.data.Dataset.from_tensor_slices(LINES)
    model.fit(texts.batch(4), shuffle=False, verbose=0)  # a stream, through KerasHub's preprocessor
    history = model.fit(PAIRS, validation_data=texts, verbose=0).history
    assert history["val_loss"][0] == pytest.approx(evaluated(model, LINES)["loss"], rel=1e-5)


@pytest.mark.backends("torch")
def test_control_tokens_in_strings_are_parsed_as_the_tokenizer_does(folder):
    model = load(folder, special_tokens_in_strings=True)
    turn = "<start_of_turn>user\nHello<end_of_turn>\n"
    (example,) = read_examples(model, ["<bos>" + turn]).examples
    ids = model.preprocessor.tokenizer(turn)
    assert example.ids.tolist() == [2, *ids, 1]


@pytest.mark.backends("torch")
def test_a_preprocessor_says_whether_a_text_has_a_beginning_and_an_end(folder):
    model = load(folder)
    tokenizer = GemmaTokenizer(proto=chat_tokenizer_model())
    model.preprocessor = GemmaCausalLMPreprocessor(
        tokenizer, sequence_length=LENGTH, add_start_token=False, add_end_token=False
    )
    (example,) = read_examples(model, LINES[:1]).examples
    assert example.ids.tolist() == list(tokenizer(LINES[0]))


# --- packed rows ---------------------------------------------------------------------------------


def gradients(model, batch, total):
    """As for each trainable variable, of the sum of losses over `total`."""
    inputs, targets, weights = batch
    variables = model.trainable_variables
    values = [ops.convert_to_numpy(variable).copy() for variable in variables]
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    model.preprocessor, kept = None, model.preprocessor
    share = float((weights != 0).sum()) / total
    model.train_on_batch(inputs, targets, sample_weight=weights * share)
    model.preprocessor = kept
    found = [
        before - ops.convert_to_numpy(variable)
        for before, variable in zip(values, variables, strict=True)
    ]
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return found


@pytest.mark.parametrize("generation", ["gemma", "gemma2", "gemma3"])
def test_packed_examples_give_loss_and_gradients_of_each_alone(tmp_path, generation):
    from gemma_keras.train.batches import RowBatches

    model = load(write_tiny_chat(tmp_path, generation))
    examples = read_examples(model, ROWS).examples
    total = sum(int(example.counts[1:].sum()) for example in examples)
    # longer than the window, and more than one example behind another
    packed = RowBatches(examples, LENGTH, 3, packed=True)
    assert packed.rows < len(examples) - 1 and packed.of_a_pass == 1
    together = gradients(model, packed[0], total)
    alone = RowBatches(examples, LENGTH - 13, 1)
    each = [gradients(model, alone[n], total) for n in range(alone.of_a_pass)]
    for n, (found, variable) in enumerate(zip(together, model.trainable_variables, strict=True)):
        expected = sum(one[n] for one in each)
        assert np.abs(expected).max() > 0, variable.path
        assert np.abs(found - expected).max() < 1e-5 * max(1.0, np.abs(expected).max()), (
            variable.path
        )
    found, expected = (evaluated(model, ROWS, pack=p)["loss"] for p in (True, False))
    assert found == pytest.approx(expected, rel=1e-5)


def test_examples_of_a_row_do_not_see_each_other(folder):
    """Hidden states are what they are without the others, to the last bit where these change."""
    model = load(folder)
    random = np.random.default_rng(0)
    ids = random.integers(4, 300, (2, 40)).astype("int32")
    ids[1, 12:30] = ids[0, 12:30]  # the second of three examples is the same
    mask = np.repeat([[1] * 12 + [13] * 18 + [31] * 7 + [0] * 3], 2, axis=0).astype("int32")
    hidden = ops.convert_to_numpy(model.backbone({"token_ids": ids, "padding_mask": mask}))
    np.testing.assert_array_equal(hidden[0, 12:30], hidden[1, 12:30])
    ones = np.ones((1, 18), "int32")
    alone = model.backbone({"token_ids": ids[:1, 12:30], "padding_mask": ones})
    alone = ops.convert_to_numpy(alone)[0]
    assert np.abs(hidden[0, 12:30] - alone).max() < 1e-5 * np.abs(alone).max()


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.backends("torch")
def test_what_does_not_fit_rows_is_refused(folder):
    model = load(folder)
    for name in ("y", "sample_weight", "class_weight"):
        with pytest.raises(ValueError, match=f"{name} is for arrays, and x holds rows"):
            model.fit(PAIRS, **{name: {0: 1.0} if name == "class_weight" else np.ones(3)})
    arrays = model.preprocessor(LINES)
    for option in ({"pack": True}, {"on_too_long": "skip"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for rows, but x holds none"):
            model.fit(arrays[0], arrays[1], **option)
    model.preprocessor = None
    with pytest.raises(ValueError, match="x holds rows, but the model has no preprocessor"):
        model.fit(PAIRS, pack=True)


@pytest.mark.backends("torch")
def test_sizes_and_tuples_that_mean_something_else_are_refused(folder):
    model = load(folder)
    for size in (0, -1, 2.0, "2"):
        with pytest.raises(ValueError, match=r"batch_size is .*; it must be a positive integer"):
            model.fit(PAIRS, batch_size=size, verbose=0)
    for split in ("0.4", 1.5, -0.5):
        with pytest.raises(ValueError, match=r"validation_split is .*; it must be at least 0"):
            model.fit(PAIRS, validation_split=split, verbose=0)
    with pytest.raises(ValueError, match=r"give prompts and answers as {'prompts'"):
        model.fit((LINES[:2], LINES[2:4]), verbose=0)
    with pytest.raises(ValueError, match="validation_data is a tuple, which Keras takes"):
        model.fit(PAIRS, validation_data=(LINES[:2], LINES[2:4]), verbose=0)
    with pytest.raises(RowError, match=r"^validation_data: row 1: its text is empty"):
        model.fit(PAIRS, validation_data=[""], verbose=0)
    with pytest.raises(RowError, match=r"^validation_data: there are no rows to learn from"):
        model.fit(PAIRS, validation_data=[], verbose=0)
    alone = model.fit(PAIRS, validation_data=(LINES, None), verbose=0).history["val_loss"]
    assert alone[0] == pytest.approx(evaluated(model, LINES)["loss"], rel=1e-5)


@pytest.mark.backends("torch")
def test_what_was_cut_of_rows_to_measure_is_told(folder, capsys):
    model = load(folder, sequence_length=24)
    model.evaluate(ROWS, verbose=2)
    assert "2 cut to 25 tokens (row 1, row 2); 2 skipped" in capsys.readouterr().out
    model.fit(PAIRS[2:], validation_data=ROWS, verbose=2)
    assert "validation_data: 3 examples of" in capsys.readouterr().out
    model.evaluate(PAIRS[2:], verbose=2)
    assert "examples" not in capsys.readouterr().out


@pytest.mark.backends("torch")
def test_rows_that_cannot_be_used_are_named(folder):
    model = load(folder)
    bad = {"messages": [{"role": "assistant", "content": "Hello."}]}
    with pytest.raises(RowError, match="row 2: "):
        model.fit([TALKS[0], bad], verbose=0)
    with pytest.raises(RowError, match="row 2: a row has the keys 'question'"):
        model.evaluate([TALKS[0], {"question": "Who?"}], verbose=0)
    with pytest.raises(ValueError, match=r"validation_split=0\.01 of 5 examples leaves nothing"):
        model.fit(ROWS, validation_split=0.01, verbose=0)


@pytest.mark.backends("torch")
def test_float16_weights_and_a_loss_that_is_not_finite_are_told(folder):
    for dtype in ("float16", "bfloat16"):
        with pytest.warns(UserWarning, match=f"with dtype='mixed_{dtype}', or use LoRA"):
            load(folder, keras.optimizers.SGD(0.0), dtype=dtype).fit(PAIRS, verbose=0)
    backbone = GemmaBackbone(load(folder).backbone.config, dtype="float32")
    model = GemmaCausalLM(backbone, load(folder).preprocessor)
    backbone.layer_norm.scale.assign(np.full(backbone.layer_norm.scale.shape, np.nan))
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    with pytest.warns(UserWarning, match="the loss is nan from batch 0 on"):
        model.fit(PAIRS, verbose=0)
