"""A training that was interrupted goes on as if it had not been."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from edge_demo import durable
from gemma_keras import GemmaCausalLM
from gemma_keras.errors import CheckpointError
from gemma_keras.train import training_state
from tests.models import TEXT, write_tiny_chat

pytestmark = pytest.mark.keras

ROOT = Path(__file__).parents[2]
ROWS = TEXT.splitlines()[:7]
PER_EPOCH = 4  # of seven rows by two
OPTIONS = {"epochs": 2, "batch_size": 2, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("resume"))


class Interrupts(keras.callbacks.Callback):
    """Ctrl-C after some batches."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def on_train_batch_begin(self, batch, logs=None):
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt


class Waits(keras.callbacks.Callback):
    """Says that the third batch is next, and waits to be killed."""

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 2:
            print("waiting", flush=True)
            sys.stdin.readline()


def load(folder, kind="lora"):
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=48)
    steps = 2 if kind == "accumulated" else None
    if kind != "full":
        model.enable_lora(rank=2, dropout=0.3, targets="all-linear")
    rate = keras.optimizers.schedules.CosineDecay(3e-3, 16)
    model.compile(keras.optimizers.Adam(rate, gradient_accumulation_steps=steps))
    return model


def state_of(model):
    variables = training_state.variables_of(model)
    return {name: ops.convert_to_numpy(v.value).copy() for name, v in variables.items()}


def fit(model, folder, verbose=0, **options):
    np.random.seed(7)  # what is drawn is the same, whatever was drawn before
    options = OPTIONS | options
    return model.fit(ROWS, checkpoint_dir=folder, verbose=verbose, **options)


WHERE = [("lora", 6), ("full", 1), ("accumulated", PER_EPOCH)]  # in an epoch, or at its end
# Files and messages are the same on each backend, and a fit of TensorFlow takes ten seconds.
of_quick_backends = pytest.mark.backends("torch", "jax")


@pytest.mark.parametrize(("kind", "after"), WHERE)
def test_it_is_bit_equal_wherever_it_was_interrupted(folder, tmp_path, kind, after):
    whole = load(folder, kind)
    history = fit(whole, tmp_path / "whole")
    expected = state_of(whole)
    there = tmp_path / "there"
    with pytest.raises(KeyboardInterrupt):
        fit(load(folder, kind), there, callbacks=[Interrupts(after)])
    again = load(folder, kind)
    np.random.seed(99)
    shown = again.fit(ROWS, checkpoint_dir=there, verbose=0, **OPTIONS)
    found, epochs = state_of(again), slice(after // PER_EPOCH, None)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    for name in ("loss", "perplexity"):
        assert shown.history[name] == history.history[name][epochs]
    assert shown.epoch == history.epoch[epochs]
    assert any(name.startswith("seed.") for name in expected) == (kind != "full")


@of_quick_backends
def test_it_goes_on_with_more_epochs_and_rests_when_all_are_done(folder, tmp_path, capsys):
    whole = load(folder)
    fit(whole, tmp_path / "whole", epochs=3)
    model = load(folder)
    fit(model, tmp_path / "parts", epochs=1, verbose=2)
    assert "going on" not in capsys.readouterr().out
    model = load(folder)
    fit(model, tmp_path / "parts", epochs=3, verbose=2)
    assert f"going on from {tmp_path / 'parts' / 'step-00000004.npz'}: epoch 2, batch 1 of 4" in (
        capsys.readouterr().out
    )
    for name, array in state_of(whole).items():
        np.testing.assert_array_equal(state_of(model)[name], array)
    assert fit(model, tmp_path / "parts", epochs=3).epoch == []
    names = [path.name for path in (tmp_path / "parts").iterdir()]
    assert sorted(names) == [".lock", "step-00000011.npz", "step-00000012.npz"]
    capsys.readouterr()
    fit(model, tmp_path / "parts", epochs=2, verbose=2)
    assert "step-00000012.npz is of the end of epoch 2\n" in capsys.readouterr().out


@of_quick_backends
def test_a_second_interruption_while_batches_are_skipped_loses_nothing(folder, tmp_path):
    whole = load(folder)
    fit(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(load(folder), tmp_path / "there", callbacks=[Interrupts(7)])
    again = load(folder)
    with pytest.raises(KeyboardInterrupt):
        fit(again, tmp_path / "there", callbacks=[Interrupts(2)])
    fit(again, tmp_path / "there")
    for name, array in state_of(whole).items():
        np.testing.assert_array_equal(state_of(again)[name], array)


@of_quick_backends
def test_a_schedule_by_epochs_is_applied_once(folder, tmp_path):
    def made():
        model = load(folder)
        model.compile(keras.optimizers.Adam(1e-2))
        return model, keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)

    (whole, halves), (again, also) = made(), made()
    fit(whole, tmp_path / "whole", callbacks=[halves])
    with pytest.raises(KeyboardInterrupt):
        model, other = made()
        fit(model, tmp_path / "there", callbacks=[other, Interrupts(6)])
    fit(again, tmp_path / "there", callbacks=[also])
    assert float(ops.convert_to_numpy(again.optimizer.learning_rate)) == pytest.approx(2.5e-3)
    for name, array in state_of(whole).items():
        np.testing.assert_array_equal(state_of(again)[name], array)


@of_quick_backends
def test_averaged_weights_are_not_what_goes_on(folder, tmp_path):
    def made():
        model = load(folder)
        model.compile(keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.5))
        return model

    whole, parts = made(), made()
    fit(whole, tmp_path / "whole", epochs=2, checkpoint_every=100)
    fit(made(), tmp_path / "parts", epochs=1, checkpoint_every=100)
    fit(parts, tmp_path / "parts", epochs=2, checkpoint_every=100)
    for name, array in state_of(whole).items():
        np.testing.assert_array_equal(state_of(parts)[name], array)


@of_quick_backends
def test_weights_that_are_not_finite_are_not_kept(folder, tmp_path):
    model = load(folder, "full")
    model.compile(keras.optimizers.SGD(1e30))
    with pytest.warns(UserWarning, match="the loss is"):
        fit(model, tmp_path, callbacks=[keras.callbacks.TerminateOnNaN()])
    for path in tmp_path.glob("*.npz"):
        with np.load(path) as arrays:
            losses = [arrays[name] for name in arrays.files if name.startswith("metric.")]
        assert np.isfinite(losses).all()


@of_quick_backends
def test_it_says_where_it_can_go_on(folder, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        fit(load(folder), tmp_path, verbose=2, callbacks=[Interrupts(3)], checkpoint_every=2)
    assert f"its last checkpoint is {tmp_path / 'step-00000002.npz'}, from which" in (
        capsys.readouterr().out
    )
    with pytest.raises(KeyboardInterrupt):
        fit(load(folder), tmp_path / "new", verbose=2, callbacks=[Interrupts(0)])
    assert "ended before its first checkpoint" in capsys.readouterr().out


@of_quick_backends
@pytest.mark.parametrize("how", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_one_that_ends_while_it_is_written_leaves_the_one_before(
    folder, tmp_path, monkeypatch, how
):
    save = np.savez

    def half(file, **arrays):
        if len(list(tmp_path.glob("step-*"))) == 2:
            file.write(b"half of it")
            raise how
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", half)
    interrupted = isinstance(how, KeyboardInterrupt)
    with pytest.raises(
        KeyboardInterrupt if interrupted else CheckpointError,
        match=None if interrupted else "no space was left",
    ):
        fit(load(folder), tmp_path)
    monkeypatch.undo()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".lock", "step-00000001.npz", "step-00000002.npz"]
    again, whole = load(folder), load(folder)
    fit(again, tmp_path)
    fit(whole, tmp_path / "whole")
    for name, array in state_of(whole).items():
        np.testing.assert_array_equal(state_of(again)[name], array)


@of_quick_backends
def test_two_trainings_do_not_share_a_folder(folder, tmp_path, monkeypatch, capsys):
    there = tmp_path / "there"
    code = (
        "import sys; from tests.gemma_keras.test_resume import Waits, fit, load; "
        "fit(load(sys.argv[1]), sys.argv[2], callbacks=[Waits()])"
    )
    command = [sys.executable, "-c", code, str(folder), str(there)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        try:
            assert other.stdout.readline() == "waiting\n"
            with pytest.raises(CheckpointError, match=f"another training is writing to {there}; "):
                fit(load(folder), there)
            monkeypatch.setattr(durable, "fcntl", None)  # as on Windows
            with training_state.only_training_in(there):
                pass
            monkeypatch.undo()
        finally:
            other.kill()
    assert other.returncode == -signal.SIGKILL
    fit(load(folder), there, verbose=2)
    assert f"going on from {there / 'step-00000002.npz'}" in capsys.readouterr().out


@of_quick_backends
def test_what_is_of_another_training_is_refused(folder, tmp_path):
    fit(load(folder), tmp_path, epochs=1)
    with pytest.raises(
        CheckpointError, match="a training with other rows and 4 batches an epoch; give what"
    ):
        load(folder).fit(ROWS[1:], checkpoint_dir=tmp_path, verbose=0, **OPTIONS)
    with pytest.raises(CheckpointError, match="with other options"):
        fit(load(folder), tmp_path, pack=True)
    with pytest.raises(CheckpointError, match="with another base model"):
        model = load(folder)
        model.backbone.token_embedding.embeddings.assign_add(
            ops.ones(model.backbone.token_embedding.embeddings.shape)
        )
        fit(model, tmp_path)
    with pytest.raises(CheckpointError, match="4 batches an epoch"):
        fit(load(folder), tmp_path, steps_per_epoch=3)
    model = load(folder)
    before = state_of(model)
    model.compile(keras.optimizers.SGD())
    for other in (keras.optimizers.SGD(), keras.optimizers.Adam(beta_1=0.8)):
        model.compile(other)
        with pytest.raises(CheckpointError, match="a training with another optimizer; give what"):
            fit(model, tmp_path)
    model = load(folder)
    model.enable_lora(rank=2, alpha=8, dropout=0.3, targets="all-linear", name="other")
    with pytest.raises(CheckpointError, match="with another LoRA"):
        fit(model, tmp_path)
    with pytest.raises(CheckpointError, match="with other options"):
        fit(load(folder), tmp_path, shuffle=False)
    for name, array in state_of(load(folder)).items():
        np.testing.assert_array_equal(before[name], array)


@of_quick_backends
def test_what_cannot_be_used_is_said(folder, tmp_path):
    fit(load(folder), tmp_path / "run", epochs=1)
    last = tmp_path / "run" / "step-00000004.npz"
    whole = last.read_bytes()
    for damaged in (b"", whole[:200], whole[:-200], whole.replace(b"optimizer", b"optimixer")):
        last.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{last} is (damaged|of another)"):
            fit(load(folder), tmp_path / "run")
    last.write_bytes(whole)
    with np.load(last) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    with zipfile.ZipFile(last, "w") as file:  # one array states 8 TB
        for name in held:
            with file.open(f"{name}.npy", "w") as member:
                shape = (1 << 40,) if name == "weight.0" else held[name].shape
                header = {"descr": "<f8", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(CheckpointError, match=r"weight\.0\.npy states more bytes than"):
        fit(load(folder), tmp_path / "run")
    last.unlink()
    fit(load(folder), tmp_path / "run", epochs=1)  # from the one before
    assert last.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot make"):
        fit(load(folder), tmp_path / "file")
    (tmp_path / "taken" / ".lock").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"cannot write .*\.lock: Is a directory"):
        fit(load(folder), tmp_path / "taken")
    with pytest.raises(ValueError, match="checkpoint_dir is for rows"):
        ids = np.ones((2, 8), int)
        load(folder).fit({"token_ids": ids, "padding_mask": ids}, ids, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="initial_epoch is what checkpoint_dir says"):
        fit(load(folder), tmp_path / "run", initial_epoch=1)
    for wrong in (0, "a", 2.5):
        with pytest.raises(ValueError, match=f"checkpoint_every is {wrong!r}"):
            fit(load(folder), tmp_path / "run", checkpoint_every=wrong)
    with pytest.raises(ValueError, match="checkpoint_dir is ''; it must be the path of a folder"):
        fit(load(folder), "")
    model = load(folder)
    model.compile(keras.optimizers.Adam(), steps_per_execution=3)
    with pytest.raises(ValueError, match="4 batches, which steps_per_execution=3 does not divide"):
        fit(model, tmp_path / "several")
