"""Preferences: values by hand, and that a model learns to prefer."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaCausalLM
from gemma_keras.train.errors import RowError
from gemma_keras.train.fit import read_examples
from gemma_keras.train.preferences import PreferenceTuner
from tests.gemma_keras.stops import check_stops, stops_on
from tests.models import write_tiny_chat

pytestmark = pytest.mark.keras

ROWS = [
    {"prompt": "The boat", "chosen": " went down the river.", "rejected": " sank."},
    {"prompt": "Seven", "chosen": " stones lay on the table.", "rejected": " bread; she counted."},
    {
        "prompt": [{"role": "user", "content": "Is the shop open?"}],
        "chosen": [{"role": "assistant", "content": "It closes at five."}],
        "rejected": [{"role": "assistant", "content": "No, and yes, and no."}],
    },
]
LENGTH = 64
BETA = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("preferences"))


def load(folder, seed=0, lora=True):
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=LENGTH)
    table = model.backbone.token_embedding
    table.embeddings.assign(table.embeddings * 0.25)
    if lora:
        model.enable_lora(rank=2, targets="all-linear")
        random = np.random.default_rng(seed)
        for variable in model.trainable_variables:
            variable.assign(random.normal(size=variable.shape).astype("float32") * 0.1)
    return model


def log_probabilities(model, rows=ROWS):
    """Of the chosen and the rejected answer of each row: the sum in float64, and the tokens."""
    tuner = PreferenceTuner(model)
    tuner.compile()
    found = []
    for row in rows:
        example = read_examples(tuner, [row]).examples[0]
        for text in example.texts:
            ids, counts = example.ids[text], example.counts[text][1:]
            logits = model.logits(ids[None, :-1])[0].astype("float64")
            right = np.take_along_axis(logits, ids[1:, None], -1)[:, 0]
            each = (right - np.log(np.exp(logits).sum(-1)))[counts]
            found.append((each.sum(), counts.sum()))
    return np.array(found).reshape(len(rows), 2, 2)


LOSSES = {
    "sigmoid": lambda d: np.log1p(np.exp(-BETA * d)),
    "hinge": lambda d: np.maximum(0, 1 - BETA * d),
    "ipo": lambda d: (d - 1 / (2 * BETA)) ** 2,
    "sigmoid_norm": lambda d: np.log1p(np.exp(-BETA * d)),
}


# Each form is a graph to be compiled, where the backend compiles.
COMPILED = keras.config.backend() != "torch"
of_each_form = pytest.mark.parametrize("form", ["sigmoid", "ipo"] if COMPILED else LOSSES)


@of_each_form
def test_the_loss_is_what_it_is_by_hand(folder, form):
    model = load(folder)
    policy = log_probabilities(model)
    with model.without_adapter():
        reference = log_probabilities(model)
    gains = policy[..., 0] - reference[..., 0]
    assert np.abs(gains).min() > 0.01
    if form in ("ipo", "sigmoid_norm"):
        gains = gains / policy[..., 1]
    delta = gains[:, 0] - gains[:, 1]
    tuner = PreferenceTuner(model, form, BETA)
    tuner.compile()
    for size in (2,) if COMPILED else (1, 2, 3):
        found = tuner.evaluate(ROWS, batch_size=size, verbose=0, return_dict=True)
        assert found["loss"] == pytest.approx(LOSSES[form](delta).mean(), rel=1e-4)
        assert found["reward_margin"] == pytest.approx(BETA * delta.mean(), rel=1e-4)
        assert found["chosen_reward"] == pytest.approx(BETA * gains[:, 0].mean(), rel=1e-4)
        assert found["rejected_reward"] == pytest.approx(BETA * gains[:, 1].mean(), rel=1e-4)
        assert found["preference_accuracy"] == pytest.approx((delta > 0).mean())


@pytest.mark.backends("torch")
@pytest.mark.parametrize("form", LOSSES)
def test_a_step_goes_along_the_gradient(folder, form):
    """SGD's step is the gradient: along it the loss, in float64 by hand, has the slope of its
    square."""
    model, rate, far = load(folder), 1.0, 1e-3
    with model.without_adapter():
        reference = log_probabilities(model)
    before = [ops.convert_to_numpy(w.value).copy() for w in model.trainable_variables]
    tuner = PreferenceTuner(model, form, BETA)
    tuner.compile(keras.optimizers.SGD(rate))
    tuner.fit(ROWS, batch_size=3, verbose=0)
    after = [ops.convert_to_numpy(w.value).copy() for w in model.trainable_variables]
    step = [(a - b) / rate for a, b in zip(after, before, strict=True)]
    square = sum((one.astype("float64") ** 2).sum() for one in step)

    def loss(along):
        scale = along / np.sqrt(square)
        for w, b, s in zip(model.trainable_variables, before, step, strict=True):
            w.assign(b + scale * s)
        policy = log_probabilities(model)
        gains = policy[..., 0] - reference[..., 0]
        if form in ("ipo", "sigmoid_norm"):
            gains = gains / policy[..., 1]
        return LOSSES[form](gains[:, 0] - gains[:, 1]).mean()

    slope = (loss(far) - loss(-far)) / (2 * far)
    assert slope == pytest.approx(-np.sqrt(square), rel=0.02)


@of_each_form
def test_the_margin_grows(folder, form):
    model = load(folder)
    tuner = PreferenceTuner(model, form, BETA)
    tuner.compile(keras.optimizers.Adam(1e-2))
    before = tuner.evaluate(ROWS, verbose=0, return_dict=True)
    tuner.fit(ROWS, epochs=8, batch_size=2, validation_data=ROWS[:1], verbose=0)
    after = tuner.evaluate(ROWS, verbose=0, return_dict=True)
    assert after["loss"] < before["loss"]
    assert after["reward_margin"] > before["reward_margin"]


@pytest.mark.backends("torch", "jax")
def test_callbacks_know_which_way_is_better(folder):
    tuner = PreferenceTuner(load(folder), beta=BETA)
    tuner.compile(keras.optimizers.Adam(1e-2))
    stops = stops_on("loss", *PreferenceTuner.shown)
    history = tuner.fit(
        ROWS, validation_data=ROWS, epochs=3, batch_size=3, verbose=0, callbacks=stops
    ).history
    up = ("reward_margin", "preference_accuracy", "chosen_reward")
    check_stops(stops, history, greater={f"val_{name}" for name in up})
    assert len(set(history["val_reward_margin"])) == 3


def test_the_reference_is_asked_once(folder, monkeypatch):
    model, asked = load(folder), []
    tuner = PreferenceTuner(model)
    tuner.compile(keras.optimizers.Adam(1e-2))
    predict = type(model.backbone).predict
    monkeypatch.setattr(
        type(model.backbone), "predict", lambda *a, **k: asked.append(1) or predict(*a, **k)
    )
    before = tuner.evaluate(ROWS, verbose=0, return_dict=True)
    assert len(asked) == 2 * len(ROWS)
    tuner.fit(ROWS, batch_size=2, verbose=0)
    assert len(asked) == 2 * len(ROWS)
    assert model.active_adapter == "default"
    assert tuner.evaluate(ROWS, verbose=0, return_dict=True)["loss"] != before["loss"]


def test_without_an_adapter_the_reference_is_the_model_before_training(folder):
    model = load(folder, lora=False)
    tuner = PreferenceTuner(model)
    tuner.compile(keras.optimizers.Adam(1e-3))
    first = tuner.evaluate(ROWS, verbose=0, return_dict=True)
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert first["reward_margin"] == pytest.approx(0, abs=1e-4)
    tuner.fit(ROWS[:2], batch_size=2, epochs=3, verbose=0)
    assert tuner.evaluate(ROWS, verbose=0, return_dict=True)["loss"] != first["loss"]
    other = [ROWS[0] | {"chosen": " stood."}]
    with pytest.raises(ValueError, match="the reference is the model before training"):
        tuner.evaluate(other, verbose=0)
    given = PreferenceTuner(model, reference=load(folder, lora=False))
    given.compile()
    assert given.evaluate(ROWS[:2], verbose=0, return_dict=True)["reward_margin"] > 0


def test_another_adapter_is_followed(folder):
    model = load(folder)
    tuner = PreferenceTuner(model, beta=BETA)
    tuner.compile(keras.optimizers.Adam(1e-2))
    tuner.fit(ROWS, batch_size=3, verbose=0)
    with_it = tuner.evaluate(ROWS, verbose=0, return_dict=True)
    with model.without_adapter():
        without = tuner.evaluate(ROWS, verbose=0, return_dict=True)
    assert without["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert tuner.evaluate(ROWS, verbose=0, return_dict=True) == pytest.approx(with_it)
    model.enable_lora(rank=3, name="other")
    tuner.fit(ROWS, batch_size=3, verbose=0)
    assert int(tuner.optimizer.iterations.value) == 1


def test_the_same_tokens_divided_otherwise_are_another_pair(folder):
    model = load(folder, lora=False)
    tuner = PreferenceTuner(model, beta=BETA)
    tuner.compile()
    rows = [
        {"prompt": "The boat went", "chosen": " down the river.", "rejected": " under a bridge."},
        {
            "prompt": "The boat",
            "chosen": " went down the river.",
            "rejected": " went under a bridge.",
        },
    ]
    for row in rows:
        found = tuner.evaluate([row], verbose=0, return_dict=True)
        assert found["chosen_reward"] == pytest.approx(0, abs=1e-4)


def test_accumulated_batches_are_the_mean_over_pairs(folder):
    """Two batches of two and one pairs move the weights as one batch of three does."""
    found = []
    for size, accumulated in ((3, None), (2, 2)):
        model = load(folder)
        tuner = PreferenceTuner(model, beta=BETA)
        tuner.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulated))
        tuner.fit(ROWS, batch_size=size, shuffle=False, verbose=0)
        found.append([ops.convert_to_numpy(w.value) for w in model.trainable_variables])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max())


def test_training_goes_on_where_it_was_interrupted(folder, tmp_path):
    def fit(there, epochs):
        model = load(folder)
        tuner = PreferenceTuner(model, beta=BETA)
        tuner.compile(keras.optimizers.Adam(1e-2))
        np.random.seed(3)
        tuner.fit(ROWS, batch_size=1, epochs=epochs, verbose=0, checkpoint_dir=there)
        return [ops.convert_to_numpy(w.value) for w in model.trainable_variables]

    whole = fit(tmp_path / "whole", 2)
    fit(tmp_path / "parts", 1)
    for a, b in zip(whole, fit(tmp_path / "parts", 2), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_does_not_fit_is_refused(folder):
    model = load(folder)
    for options, message in (
        ({"form": "kto"}, "form is 'kto'; it must be one of sigmoid, hinge, ipo, sigmoid_norm"),
        ({"beta": 0}, "beta is 0; it must be more than 0"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"form": ["sigmoid"]}, "form is"),
        ({"reference": model}, "the reference is the model itself"),
        ({"reference": "x"}, "the reference must be a GemmaCausalLM, not str"),
    ):
        with pytest.raises(ValueError, match=message):
            PreferenceTuner(model, **options)
    tuner = PreferenceTuner(model)
    tuner.compile()
    for rows, message in (
        (["a text"], "row 1: it needs a prompt, a chosen and a rejected answer"),
        ([ROWS[0], {"prompt": "a", "completion": "b"}], "row 2: it needs a prompt, a chosen"),
        ([ROWS[0] | {"rejected": ""}], "row 1: its text is empty"),
        ([ROWS[2] | {"chosen": "Yes."}], "prompt and chosen must be two texts, or messages both"),
        ([ROWS[0] | {"chosen": "of it " * 80}], "row 1 has .* tokens, more than 65"),
    ):
        with pytest.raises(RowError, match=message):
            tuner.fit(rows, on_too_long="error", verbose=0)
    with pytest.raises(ValueError, match="pairs of answers cannot be packed"):
        tuner.fit(ROWS, pack=True)
    with pytest.raises(RowError, match="which `fit` does not learn from"):
        model.fit(ROWS[:1])
    model.merge_lora()
    with pytest.raises(ValueError, match="merged"):
        tuner.fit(ROWS, verbose=0)


def test_a_long_answer_is_cut_and_the_prompt_stays(folder, capsys):
    tuner = PreferenceTuner(load(folder))
    rows = [ROWS[0], ROWS[1] | {"chosen": " of it" * 80}]
    found = read_examples(tuner, rows)
    assert found.truncated == ["row 2"]
    chosen, rejected = found.examples[1].texts
    assert chosen.stop - chosen.start == LENGTH + 1
    assert rejected.stop - rejected.start < LENGTH
    assert read_examples(tuner, rows, "skip").skipped == ["row 2"]
    no_room = [ROWS[0], ROWS[1] | {"prompt": "of it " * 80}]
    assert read_examples(tuner, no_room).skipped == ["row 2"]
