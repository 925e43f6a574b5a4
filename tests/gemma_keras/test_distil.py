"""Distillation: values by hand, and that a student comes nearer to its teacher."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaCausalLM
from gemma_keras.errors import CheckpointError
from gemma_keras.model.divergence import divergences
from gemma_keras.train.distil import Distiller
from gemma_keras.train.errors import RowError
from gemma_keras.train.fit import read_examples
from gemma_keras.train.teacher_targets import TeacherTargets, likeliest, write_targets
from tests.gemma_keras.stops import check_stops, stops_on
from tests.models import (
    TEXT,
    shallow,
    tiny_tokenizer_model,
    write_tiny_chat,
    write_tiny_hf,
)

pytestmark = pytest.mark.keras

ROWS = [
    *TEXT.splitlines()[:5],
    {"prompt": "The boat", "completion": " went down the river."},
]
LENGTH = 48


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student and a teacher of another size, with one tokenizer."""
    made = {}
    for seed, (name, more) in enumerate(
        {"student": {}, "teacher": {"intermediate_size": 160}}.items()
    ):
        made[name] = write_tiny_chat(tmp_path_factory.mktemp(name), seed=seed, **more)
    return made


def load(folder):
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=LENGTH)
    # Random models of this width are sure of every token; people's are not.
    table = model.backbone.token_embedding
    if table.tie_weights:
        table.embeddings.assign(table.embeddings * 0.25)
    return model


def softmax(logits, temperature):
    heated = logits.astype("float64") / temperature
    shifted = np.exp(heated - heated.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def by_hand(student, teacher, kind, temperature=1.0, top=None):
    """The divergence of each token that counts, each row alone, in float64."""
    found, text = [], []
    for example in read_examples(student, ROWS).examples:
        counts = example.counts[1:]
        raw = student.logits(example.ids[None, :-1])[0][counts]
        q = softmax(raw, temperature)
        p = softmax(teacher.logits(example.ids[None, :-1])[0][counts], temperature)
        text.extend(
            -np.log(np.take_along_axis(softmax(raw, 1), example.ids[1:][counts][:, None], -1))
        )
        if top is not None:
            ids = np.argsort(p, axis=-1)[:, -top:]
            p, q = (np.take_along_axis(one, ids, -1) for one in (p, q))
            p, q = (np.concatenate([a, 1 - a.sum(-1, keepdims=True)], -1) for a in (p, q))
        if kind == "forward":
            found.extend(kl(p, q))
        elif kind == "reverse":
            found.extend(kl(q, p))
        else:
            m = kind * p + (1 - kind) * q
            found.extend(kind * kl(p, m) + (1 - kind) * kl(q, m))
    return np.mean(found) * temperature**2, float(np.mean(text))


def shown(distiller, **options):
    return distiller.evaluate(ROWS, verbose=0, return_dict=True, **options)


@pytest.mark.parametrize("kind", ["forward", "reverse", 0.3])
def test_the_divergence_is_what_it_is_by_hand(folders, kind):
    student, teacher = load(folders["student"]), load(folders["teacher"])
    expected, text = by_hand(student, teacher, kind, temperature=2.0)
    distiller = Distiller(student, teacher, kind, temperature=2.0, text_weight=0.25)
    distiller.compile()
    for options in ({"batch_size": 2}, {"batch_size": 3, "pack": True}):
        found = shown(distiller, **options)
        assert found["divergence"] == pytest.approx(expected, rel=1e-5)
        assert np.log(found["perplexity"]) == pytest.approx(text, rel=1e-5)
        assert found["loss"] == pytest.approx(0.75 * expected + 0.25 * text, rel=1e-5)


@pytest.mark.parametrize(("kind", "temperature"), [("forward", 1.0), (0.5, 2.0)])
def test_targets_on_disk_are_the_teacher_s_likeliest(folders, tmp_path, kind, temperature):
    student, teacher = load(folders["student"]), load(folders["teacher"])
    write_targets(
        tmp_path / "targets", teacher, student, ROWS, top=20, temperature=temperature, verbose=0
    )
    distiller = Distiller(student, tmp_path / "targets", kind)
    distiller.compile()
    expected, _ = by_hand(student, teacher, kind, temperature, top=20)
    for options in ({"batch_size": 2}, {"batch_size": 3, "pack": True}):
        # log-probabilities are 16-bit floats there
        assert shown(distiller, **options)["divergence"] == pytest.approx(expected, rel=2e-3)


def test_a_student_comes_nearer(folders, tmp_path):
    student, teacher = load(folders["student"]), load(folders["teacher"])
    write_targets(tmp_path / "targets", teacher, student, ROWS, top=64, verbose=0)
    before = by_hand(student, teacher, "forward")[0]
    frozen = [ops.convert_to_numpy(w.value).copy() for w in teacher.backbone.weights]
    for source in (teacher, tmp_path / "targets"):
        distiller = Distiller(load(folders["student"]), source)
        distiller.compile(keras.optimizers.Adam(5e-3))
        history = distiller.fit(ROWS, epochs=8, batch_size=3, pack=True, verbose=0)
        assert history.history["loss"][-1] < history.history["loss"][0] * 0.8
        assert by_hand(distiller.task, teacher, "forward")[0] < 0.8 * before
    for weight, value in zip(teacher.backbone.weights, frozen, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight.value), value)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("kind", ["forward", "reverse", 0.3])
@pytest.mark.parametrize("stored", [False, True])
def test_a_step_goes_along_the_gradient(folders, tmp_path, kind, stored):
    """SGD's step is the gradient: along it the divergence, in float64 by hand, has the slope of its
    square."""
    student, teacher = load(folders["student"]), load(folders["teacher"])
    source, rate, far, heat, top = teacher, 1e-2, 1e-2, 2.0, 20 if stored else None
    if stored:
        source = write_targets(
            tmp_path / "a", teacher, student, ROWS, top=top, temperature=heat, verbose=0
        )
    before = [ops.convert_to_numpy(w.value).copy() for w in student.trainable_variables]
    distiller = Distiller(student, source, kind, heat)
    distiller.compile(keras.optimizers.SGD(rate))
    distiller.fit(ROWS, batch_size=len(ROWS), verbose=0)
    after = [ops.convert_to_numpy(w.value).copy() for w in student.trainable_variables]
    step = [(a - b) / rate for a, b in zip(after, before, strict=True)]
    square = sum((one.astype("float64") ** 2).sum() for one in step)

    def loss(along):
        scale = along / np.sqrt(square)
        for w, b, s in zip(student.trainable_variables, before, step, strict=True):
            w.assign(b + scale * s)
        return by_hand(student, teacher, kind, heat, top)[0]

    slope = (loss(far) - loss(-far)) / (2 * far)
    assert slope == pytest.approx(-np.sqrt(square), rel=0.02)


def test_each_step_is_of_its_batch_alone(folders):
    """Two steps give the weights of two steps by hand: each with the gradient of its batch."""
    teacher = load(folders["teacher"])
    rate = 0.1

    def stepped(rows):
        made = Distiller(load(folders["student"]), teacher)
        made.compile(keras.optimizers.SGD(rate))
        made.fit(rows, batch_size=1, shuffle=False, verbose=0)
        return made

    both = stepped(ROWS[:2])
    second = stepped(ROWS[:1])
    second.compile(keras.optimizers.SGD(rate))
    second.fit(ROWS[1:2], batch_size=1, verbose=0)
    for a, b in zip(both.trainable_variables, second.trainable_variables, strict=True):
        a, b = map(ops.convert_to_numpy, (a.value, b.value))
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_an_adapter_learns_and_training_goes_on(folders, tmp_path):
    teacher = load(folders["teacher"])

    def fit(folder, **options):
        student = load(folders["student"])
        student.enable_lora(rank=2, targets="all-linear")
        distiller = Distiller(student, teacher)
        distiller.compile(keras.optimizers.Adam(1e-2))
        np.random.seed(3)
        distiller.fit(ROWS, batch_size=2, verbose=0, checkpoint_dir=folder, **options)
        return [ops.convert_to_numpy(w.value) for w in student.trainable_variables]

    whole = fit(tmp_path / "whole", epochs=2)
    fit(tmp_path / "parts", epochs=1)
    for a, b in zip(whole, fit(tmp_path / "parts", epochs=2), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_student_is_what_is_saved(folders, tmp_path):
    student = load(folders["student"])
    distiller = Distiller(student, load(folders["teacher"]))
    distiller.compile(keras.optimizers.Adam(1e-3))
    kept = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="loss", mode="min")
    distiller.fit(ROWS, batch_size=3, verbose=0, callbacks=[kept])
    loaded = keras.saving.load_model(tmp_path / "best.keras")
    ids = [[2, 5, 9, 30]]
    np.testing.assert_allclose(loaded.logits(ids), student.logits(ids), atol=1e-5)
    distiller.save_weights(tmp_path / "student.weights.h5")
    other = load(folders["student"])
    other.load_weights(tmp_path / "student.weights.h5")
    np.testing.assert_allclose(other.logits(ids), student.logits(ids), atol=1e-5)


@pytest.mark.backends("torch", "jax")
def test_callbacks_know_which_way_is_better(folders):
    distiller = Distiller(load(folders["student"]), load(folders["teacher"]), text_weight=0.5)
    distiller.compile(keras.optimizers.Adam(5e-3))
    stops, options = stops_on("loss", *Distiller.shown), {"batch_size": 3, "pack": True}
    history = distiller.fit(
        ROWS, validation_data=ROWS, epochs=3, verbose=0, callbacks=stops, **options
    ).history
    check_stops(stops, history, greater={"val_sparse_categorical_accuracy"})
    assert len(set(history["val_divergence"])) == 3
    found, listed = shown(distiller, **options), distiller.evaluate(ROWS, verbose=0, **options)
    assert listed == [found[name] for name in ("loss", *Distiller.shown)]


def test_equal_distributions_have_no_divergence():
    log_p = np.log(softmax(np.random.default_rng(0).normal(size=(5, 9)), 1.0)).astype("float32")
    log_p = ops.convert_to_tensor(log_p)
    for kind in ("forward", "reverse", 0.1, 0.9):
        found = ops.convert_to_numpy(divergences(log_p, log_p, kind))
        np.testing.assert_allclose(found, 0, atol=1e-6)


def test_likeliest_are_of_the_whole_distribution():
    logits = np.random.default_rng(0).normal(size=(7, 50)).astype("float32") * 3
    ids, log_p = likeliest(logits, 5, 2.0)
    p = softmax(logits, 2.0)
    np.testing.assert_allclose(np.exp(log_p), np.take_along_axis(p, ids, -1), rtol=1e-6)
    assert (np.sort(ids) == np.sort(np.argsort(p)[:, -5:])).all()


@pytest.fixture(scope="module")
def bundle(folders, tmp_path_factory):
    """The teacher as a bundle in float32."""
    out = tmp_path_factory.mktemp("bundle") / "teacher"
    load(folders["teacher"]).export(out, format="onnx", recipe="fp32", verify=False)
    return out


def test_a_bundle_teaches_as_the_model_does(folders, bundle, tmp_path):
    student, teacher = load(folders["student"]), load(folders["teacher"])
    found = []
    for number, one in enumerate((teacher, bundle, str(bundle))):
        targets = write_targets(tmp_path / str(number), one, student, ROWS, top=30, verbose=0)
        tokens, log_p = (targets.arrays[n] for n in ("likeliest_tokens", "log_probabilities"))
        order = np.argsort(tokens, axis=-1)
        found.append([np.take_along_axis(np.array(a), order, -1) for a in (tokens, log_p)])
    for tokens, log_p in found[1:]:
        assert (tokens == found[0][0]).mean() > 0.999  # the thirtieth may be another
        np.testing.assert_allclose(np.exp(log_p), np.exp(found[0][1]), atol=1e-3)
    with pytest.raises(ValueError, match="has another tokenizer than the student"):
        other = load(folders["student"])
        other.preprocessor.tokenizer.set_proto(tiny_tokenizer_model())
        write_targets(tmp_path / "other", bundle, other, ROWS, top=30, verbose=0)


def test_long_rows_are_cut_in_targets_as_in_training(folders, tmp_path):
    student, teacher = load(folders["student"]), load(folders["teacher"])
    rows = [*ROWS, "of it " * 60]
    with pytest.raises(RowError, match=r"row 1 has \d+ tokens, more than 49"):
        write_targets(tmp_path / "a", teacher, student, rows, top=4, on_too_long="error")
    write_targets(tmp_path / "a", teacher, student, rows, top=4, verbose=0)
    distiller = Distiller(student, tmp_path / "a")
    distiller.compile()
    distiller.evaluate(rows, verbose=0)
    distiller.fit(rows, verbose=0, on_too_long="skip")


def test_targets_are_replaced_when_it_is_said(folders, tmp_path, capsys):
    student, teacher = load(folders["student"]), load(folders["teacher"])
    write_targets(tmp_path / "a", teacher, student, ROWS[:1], top=4, verbose=0)
    assert not capsys.readouterr().out
    made = write_targets(tmp_path / "a", teacher, student, ROWS, top=5, overwrite=True)
    assert "6/6" in capsys.readouterr().out
    assert made.arrays["likeliest_tokens"].shape[1] == 5
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="will not be overwritten"):
        write_targets(tmp_path / "b", teacher, student, ROWS, top=5, overwrite=True)


def test_what_does_not_fit_is_refused(folders, tmp_path):
    student, teacher = load(folders["student"]), load(folders["teacher"])
    for options, message in (
        ({"divergence": "backward"}, "divergence is 'backward'; it must be"),
        ({"divergence": 1.5}, "divergence is 1.5"),
        ({"temperature": 0}, "temperature is 0; it must be more than 0"),
        ({"text_weight": 2}, "text_weight is 2; it must be 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Distiller(student, teacher, **options)
    for call in ("fit", "evaluate"):
        with pytest.raises(ValueError, match="call compile first"):
            getattr(Distiller(student, teacher), call)(ROWS)
    for given, message in (
        ((student, student), "the teacher is the student itself"),
        ((student, 5), "the teacher must be a GemmaCausalLM or the path of targets, not int"),
        ((student, teacher.backbone), "the teacher must be a GemmaCausalLM, not GemmaBackbone"),
        (("sample", teacher), "the model to tune must be a GemmaCausalLM, not str"),
    ):
        with pytest.raises(ValueError, match=message):
            Distiller(*given)
    Distiller(student, teacher, np.float32(0.5), np.float32(2), np.float32(0.5))
    for name, value in (("metrics", ["accuracy"]), ("loss", "mse"), ("weighted_metrics", [1])):
        with pytest.raises(ValueError, match=f"a Distiller has its own {name}; leave that out"):
            Distiller(student, teacher).compile(**{name: value})
    frozen = load(folders["student"])
    frozen.trainable = False
    with pytest.raises(ValueError, match="all weights of the model are frozen"):
        made = Distiller(frozen, teacher)
        made.compile()
        made.fit(ROWS, verbose=0)
    with pytest.raises(ValueError, match="an engine, not int"):
        write_targets(tmp_path / "none", 5, student, ROWS, top=4)
    targets = tmp_path / "targets"
    with pytest.raises(CheckpointError, match="holds no targets of a teacher"):
        Distiller(student, targets)
    with pytest.raises(ValueError, match="top is 0; it must be 1 to"):
        write_targets(targets, teacher, student, ROWS, top=0)
    with pytest.raises(ValueError, match="temperature is -1; it must be more than 0"):
        write_targets(targets, teacher, student, ROWS, top=4, temperature=-1)
    write_targets(targets, teacher, student, ROWS[:3], top=4, verbose=0)
    with pytest.raises(CheckpointError, match="already exists"):
        write_targets(targets, teacher, student, ROWS[:3], top=4, verbose=0)
    with pytest.raises(ValueError, match="written at a temperature of 1"):
        Distiller(student, targets, temperature=2.0)
    distiller = Distiller(student, TeacherTargets.open(targets))
    distiller.compile()
    with pytest.raises(RowError, match="a row is not among those of"):
        distiller.fit(ROWS, verbose=0)
    about = json.loads((targets / "targets.json").read_text())
    (targets / "targets.json").write_text(json.dumps(about | {"tokenizer": "0"}))
    with pytest.raises(ValueError, match="written with another tokenizer"):
        Distiller(student, targets)
    (targets / "targets.json").write_text(json.dumps(about))
    index = (targets / "index.npz").read_bytes()
    (targets / "index.npz").write_bytes(index[:-20])
    with pytest.raises(CheckpointError, match="are damaged"):
        Distiller(student, targets)
    (targets / "index.npz").write_bytes(index)
    whole = (targets / "likeliest_tokens.npy").read_bytes()
    (targets / "likeliest_tokens.npy").write_bytes(whole[:-4] + b"\xff\xff\xff\x7f")
    with pytest.raises(CheckpointError, match="are damaged: they name no token"):
        made = Distiller(student, targets)
        made.compile()
        made.evaluate(ROWS[:3], verbose=0)
    (targets / "likeliest_tokens.npy").write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="are damaged"):
        Distiller(student, targets)


def test_a_teacher_of_another_vocabulary_is_refused(folders, tmp_path):
    other = tmp_path / "other"
    write_tiny_hf(other, "gemma3", vocab_size=320, **shallow("gemma3"))
    teacher = GemmaCausalLM.from_preset(other, dtype="float32")
    teacher.preprocessor = None
    student = load(folders["student"])
    with pytest.raises(ValueError, match="the student has a vocabulary of"):
        Distiller(student, teacher)
    with pytest.raises(ValueError, match="of 300 and the teacher of 320; their"):
        write_targets(tmp_path / "targets", teacher, student, ROWS, top=4, verbose=0)
    assert not (tmp_path / "targets").exists()
    with pytest.raises(ValueError, match="has no preprocessor"):
        Distiller(teacher, student)
