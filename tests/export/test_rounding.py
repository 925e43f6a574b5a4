"""Calibration text, the workspace, sensitivities, and the search within a budget."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.evaluate.perplexity import kl_divergence
from export import export_onnx
from export.calibrate.budget import plan_within
from export.calibrate.calibrate import calibrate
from export.calibrate.reference import reference_logits
from export.calibrate.self_sample import self_sample
from export.calibrate.sensitivity import group_members, sensitivities
from export.calibrate.text import cut_text
from export.calibrate.workspace import Workspace, fingerprint, workspace_path
from export.choose_formats import _Attempt, _search, self_written_rows
from export.errors import ExportRequestError
from export.formats.formats import plan_bytes
from export.formats.recipes import INT4, TWO_PLANES, plan_for_recipe, plan_from_json, raised_plan
from gemma_keras import named_config, open_checkpoint
from gemma_keras.sizes import SIZES
from tests.models import GENERATIONS, TEXT, write_tiny_hf

pytestmark = pytest.mark.keras

each_generation = pytest.mark.parametrize("generation", GENERATIONS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = {}

    def get(generation):
        if generation not in made:
            folder = tmp_path_factory.mktemp(generation) / "checkpoint"
            write_tiny_hf(folder, generation)
            checkpoint = open_checkpoint(folder)
            weights = {name: np.array(array) for name, array in checkpoint.weights.items()}
            made[generation] = SimpleNamespace(
                folder=folder, checkpoint=checkpoint, config=checkpoint.config, weights=weights
            )
        return made[generation]

    return get


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def random_rows(count=3, length=60, seed=0):
    ids = np.random.default_rng(seed).integers(4, 300, (count, length)).astype(np.int32)
    ids[:, 0] = 2
    return ids


# --- text ----------------------------------------------------------------------------------------


def test_a_text_is_cut_into_rows_that_begin_as_gemma_expects():
    text = cut_text(2, list(range(100, 1800)), 1000, "a text")
    assert text.rows.shape == (5, 256)
    assert text.held_out.shape == (1, 256)
    everything = np.concatenate([text.rows, text.held_out])
    assert (everything[:, 0] == 2).all()
    np.testing.assert_array_equal(everything[:, 1:].ravel(), np.arange(100, 100 + 6 * 255))
    assert text.positions[0] == 128
    assert text.positions[-1] < 256


@pytest.mark.parametrize("count", [128, 300, 20_000])
@pytest.mark.parametrize("context", [64, 8192])
def test_rows_fit_the_context_and_some_are_held_out(count, context):
    text = cut_text(2, [7] * count, context, "a text")
    assert 1 <= len(text.held_out) <= 4
    assert 2 <= len(text.rows) <= 64
    assert text.rows.shape[1] <= min(256, context)


@pytest.mark.parametrize("count", [0, 1, 127])
def test_a_text_that_is_too_short_is_refused(count):
    with pytest.raises(ExportRequestError, match=rf"novel is too short.* has {count} tokens.*128"):
        cut_text(2, [7] * count, 8192, "novel")


@pytest.mark.spread
@each_generation
def test_a_model_writes_its_own_text(tiny, generation, tmp_path):
    model, told = tiny(generation), []
    arguments = (model.config, model.weights, 2, (5, 40), 11, tmp_path)
    (ids,) = self_sample(*arguments, lambda *args: told.append(args))
    assert ids.shape == (5, 40)
    assert (ids[:, 0] == 2).all()
    assert told[-1] == (40, 40)
    assert list(tmp_path.iterdir()) == []
    (again,) = self_sample(*arguments, lambda *args: None)
    np.testing.assert_array_equal(ids, again)
    assert len({tuple(row) for row in ids.tolist()}) == 5
    # It is likelier under the model than what another seed's rows would be by chance.
    positions = np.arange(39)
    logits = reference_logits(model.config, model.weights, ids, positions)
    log_p = log_softmax(logits).reshape(5, 39, -1)
    own = np.take_along_axis(log_p, ids[:, 1:, None], axis=-1).mean()
    foreign = np.take_along_axis(log_p, ids[::-1][:, 1:, None], axis=-1).mean()
    entropy = -(np.exp(log_p) * log_p).sum(axis=-1).mean()
    assert own > foreign
    assert 0.6 < -own / entropy < 1.4  # 195 draws


def test_text_is_written_in_batches_that_differ_and_go_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("export.calibrate.self_sample.ROWS_AT_ONCE", 2)
    model, told = tiny("gemma3"), []
    arguments = (model.config, model.weights, 2, (5, 30), 11, tmp_path)
    batches = list(self_sample(*arguments, lambda *args: told.append(args)))
    assert [batch.shape for batch in batches] == [(2, 30), (2, 30), (1, 30)]
    assert len({row.tobytes() for batch in batches for row in batch}) == 5
    done = [steps for steps, _ in told]
    assert told[-1] == (90, 90) and done == sorted(set(done))
    for first in range(4):
        again = list(self_sample(*arguments, lambda *args: None, first))
        assert len(again) == 3 - first
        for found, expected in zip(again, batches[first:], strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", SIZES)
def test_a_larger_model_writes_fewer_rows(name):
    more = {"gemma3_270m": 159, "functiongemma_270m": 159, "embeddinggemma_300m": 90}
    assert self_written_rows(named_config(name)) == more.get(name, 36)


# --- the workspace -------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path):
    return tmp_path / "work" if request.param == "folder" else None


def test_a_workspace_gives_back_what_it_was_given(place):
    workspace = Workspace(place, "a")
    assert workspace.load("x") is None
    workspace.save("x", {"a": np.arange(5), "b": np.ones((2, 2), np.float32)})
    workspace.save("x", {"a": np.arange(6)})
    assert workspace.load("x").keys() == {"a"}
    np.testing.assert_array_equal(workspace.load("x")["a"], np.arange(6))


def test_a_workspace_is_for_one_key(tmp_path):
    Workspace(tmp_path / "work", "a").save("x", {"a": np.arange(5)})
    assert Workspace(tmp_path / "work", "a").load("x") is not None
    assert Workspace(tmp_path / "work", "b").load("x") is None
    assert Workspace(tmp_path / "work", "a").load("x") is None


@pytest.mark.parametrize("damage", ["cut", "empty", "pickle"])
def test_a_damaged_file_counts_as_missing(tmp_path, damage):
    workspace = Workspace(tmp_path / "work", "a")
    workspace.save("x", {"a": np.arange(500)})
    path = tmp_path / "work/x.npz"
    if damage == "pickle":
        np.savez(path, a=np.array([{"an": "object"}], dtype=object))
    else:
        path.write_bytes(path.read_bytes()[: 700 if damage == "cut" else 0])
    assert workspace.load("x") is None


def test_a_fingerprint_tells_any_two_exports_apart(tiny):
    config, weights = tiny("gemma3").config, tiny("gemma3").weights
    one = fingerprint(config, weights, "text", 1)
    # the same numbers read piece by piece from a file
    assert one == fingerprint(config, tiny("gemma3").checkpoint.weights, "text", 1)
    others = {one, fingerprint(config, weights, "text", 2)}
    for name in ("token_embedding", "layers.1.mlp.down", "final_norm"):
        changed = weights[name].copy()
        changed.flat[-1] = np.nextafter(changed.flat[-1], np.float32(9))
        others.add(fingerprint(config, {**weights, name: changed}, "text", 1))
    other = dataclasses.replace(config, norm_epsilon=1e-4)
    others.add(fingerprint(other, weights, "text", 1))
    assert len(others) == 6


class Interrupted(Exception):
    pass


@pytest.mark.spread
@each_generation
@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_calibration_goes_on_where_it_was(tiny, generation, after, tmp_path):
    model, ids = tiny(generation), random_rows()
    plan = plan_for_recipe("int4", model.config)

    def run(folder, stop=None):
        told = []

        def on_progress(done, total):
            told.append(done)
            if done == stop:
                raise Interrupted

        workspace = Workspace(folder, "key")
        result = calibrate(
            model.config, model.weights, ids, plan, workspace, on_progress=on_progress
        )
        return result, told

    whole, told = run(tmp_path / "whole")
    assert told == list(range(len(model.config.layers) + 1))
    with pytest.raises(Interrupted):
        run(tmp_path / "part", stop=after)
    resumed, told = run(tmp_path / "part")
    assert told[0] == after  # what was done is not done again
    for name in model.weights:
        np.testing.assert_array_equal(resumed.weights[name], whole.weights[name])
        fmt = plan.get(name)
        if fmt == INT4:
            ours, theirs = resumed.rounded(name, fmt), whole.rounded(name, fmt)
            np.testing.assert_array_equal(ours.levels, theirs.levels)
            np.testing.assert_array_equal(ours.scales, theirs.scales)


# --- sensitivities and the budget ----------------------------------------------------------------


@pytest.mark.spread
@each_generation
def test_a_sensitivity_is_the_divergence_of_the_model_with_that_group_rounded(
    tiny, generation, tmp_path
):
    model, ids = tiny(generation), random_rows(2, 40)
    plan = plan_for_recipe("int4", model.config)
    calibrated = calibrate(model.config, model.weights, ids, plan, Workspace(None, ""))
    positions = np.arange(20, 40)
    groups = group_members(model.config, plan)
    losses = sensitivities(
        model.config, calibrated.weights, plan, calibrated.rounded, groups, ids, positions
    )
    assert losses.keys() == groups.keys()
    assert len(losses) == 5 * len(model.config.layers)
    reference = reference_logits(model.config, model.weights, ids, positions)
    for group in (
        "layers.0.mlp.down",
        "layers.1.attention.key+value",
        "layers.2.mlp.gate+up",
    ):
        changed = {name: calibrated.weights[name] for name in model.weights}
        for name in groups[group]:
            fmt = plan[name]
            changed[name] = calibrated.rounded(name, fmt).values(fmt, len(changed[name])).T
        found = reference_logits(model.config, changed, ids, positions)
        divergences = kl_divergence(reference, found)
        expected = np.minimum(divergences, 10 * np.median(divergences)).mean()
        assert losses[group] == pytest.approx(expected, rel=0.02, abs=1e-9)


def test_a_plan_within_a_budget_raises_what_loses_most_for_its_bytes(tiny):
    config = tiny("gemma3").config
    plan = plan_for_recipe("int4", config)
    groups = group_members(config, plan)
    losses = dict.fromkeys(groups, 1.0)
    losses["layers.2.mlp.down"] = 50.0
    better = raised_plan(config)

    def raised(most):
        chosen = plan_within(config, plan, better, groups, losses, most)
        for name in better:
            assert chosen[name] in (plan[name], better[name])
        return {group for group in groups if chosen[groups[group][0]].bits == 8}, chosen

    total = sum(losses.values())
    assert raised(total)[0] == set()
    assert raised(total - 1)[0] == {"layers.2.mlp.down"}
    assert raised(0)[0] == set(groups)
    sizes = [plan_bytes(raised(most)[1], config) for most in np.linspace(total, 0, 12)]
    assert sizes == sorted(sizes)
    # of groups that lose the same, those of fewest bytes first
    small = raised(total - 52)[0] - {"layers.2.mlp.down"}
    bare = plan_bytes(plan, config)
    prices = {
        group: plan_bytes(plan | {n: better[n] for n in names}, config) - bare
        for group, names in groups.items()
    }
    dearest = max(prices[group] for group in small)
    assert dearest <= min(prices[g] for g in groups.keys() - small - {"layers.2.mlp.down"})


@pytest.mark.parametrize("measured", [lambda p: p, lambda p: 3 * p + 0.001, lambda p: 0.2 * p])
@pytest.mark.parametrize("budget", [0.004, 0.01, 0.04, 0.3])
def test_the_search_ends_with_the_best_within_the_budget(measured, budget):
    stored = []

    def attempt(most):
        stored.append(most)
        return _Attempt(most, {}, SimpleNamespace(mean_kl=measured(most)))

    tried = _search(attempt, budget, 0.1)
    assert len(tried) <= 7
    assert tried[-1].quality.mean_kl <= budget
    assert stored[-1] == tried[-1].predicted
    assert tried[-1].predicted == max(t.predicted for t in tried if measured(t.predicted) <= budget)
    near = measured(0.1) <= budget or tried[-1].quality.mean_kl >= 0.7 * budget
    assert near


def test_the_search_says_when_nothing_is_within_the_budget():
    tried = _search(
        lambda most: _Attempt(most, {}, SimpleNamespace(mean_kl=0.05 + most)), 0.04, 0.1
    )
    assert tried[-1].predicted == 0
    assert tried[-1].quality.mean_kl == 0.05


# --- the whole -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 4, encoding="utf-8")
    return path


@pytest.mark.spread
@each_generation
def test_int4_keeps_its_budget_and_says_what_it_chose(tiny, generation, calibration_text, tmp_path):
    model = tiny(generation)
    sizes = []
    for budget in (10.0, 0.05):
        result = export_onnx(
            model.folder,
            tmp_path / "bundle",
            "int4",
            kl_budget=budget,
            calibration=calibration_text,
            overwrite=True,
        )
        told = result.rounding
        assert told["held_out"]["mean_kl"] <= budget
        manifest = json.loads((result.path / "bundle.json").read_text())
        assert manifest["rounding"]["raised_to_8_bits"] == list(told["raised_to_8_bits"])
        groups = group_members(model.config, plan_for_recipe("int4", model.config))
        for group, names in groups.items():
            raised = group in told["raised_to_8_bits"]
            assert {manifest["plan"][n]["bits"] for n in names} == {8 if raised else 4}
        sizes.append(result.num_bytes)
    assert sizes[0] < sizes[1]
    assert not workspace_path(tmp_path / "bundle").exists()


@pytest.mark.backends("torch")  # the search is the same, whatever has measured
def test_a_budget_that_cannot_be_met_names_the_nearest_and_keeps_the_work(
    tiny, calibration_text, tmp_path
):
    def export(budget):
        stages = []
        export_onnx(
            tiny("gemma3").folder,
            tmp_path / "bundle",
            "int4",
            kl_budget=budget,
            calibration=calibration_text,
            on_progress=lambda stage, share: stages.append((stage, share)),
        )
        return stages

    with pytest.raises(
        ExportRequestError, match=r"1e-07 cannot be met: even with 8 bits .* is (0\.\d+)"
    ) as refused:
        export(1e-7)
    folder = workspace_path(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [folder]
    (note,) = refused.value.__notes__
    assert f"kept in {folder}, and the next export to {tmp_path / 'bundle'} continues from" in note
    stages = export(0.5)
    assert [share for stage, share in stages if stage == "calibration"] == [0, 1]
    assert "sensitivity" not in dict(stages)
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle"]
    again = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["rounding"]
    shutil.rmtree(tmp_path / "bundle")
    assert "sensitivity" in dict(export(0.5))
    anew = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["rounding"]
    assert again == anew


def test_a_plan_of_ones_own_is_followed(tiny, tmp_path):
    model = tiny("gemma2")
    plan = {
        "layers.0.mlp.down": {"bits": 8, "block_size": 16},
        "layers.1.mlp.down": {"bits": 4, "block_size": 64, "symmetric": False},
        "layers.2.mlp.down": {"bits": 32},
        "layers.3.mlp.down": {"bits": 2, "block_size": 32},
    }
    result = export_onnx(model.folder, tmp_path / "bundle", "int8", plan=plan, calibration="none")
    manifest = json.loads((result.path / "bundle.json").read_text())
    for name, entry in plan.items():
        assert manifest["plan"][name].items() >= entry.items()
    assert manifest["plan"]["layers.4.mlp.down"] == {
        "bits": 8,
        "block_size": 16,
        "symmetric": True,
        "planes": 1,
    }
    assert Engine(Bundle.open(result.path)).prefill([2, 5, 9]).shape == (300,)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"layers.9.mlp.down": {"bits": 8, "block_size": 32}}, "names 'layers.9.mlp.down', which"),
        ({"final_norm": {"bits": 32}}, "names 'final_norm'"),
        ({"layers.0.mlp.down": {"bits": 3, "block_size": 32}}, "unsupported format"),
        ({"layers.0.mlp.down": {"bits": "8", "block_size": 32}}, "unsupported format"),
        (
            {"layers.0.mlp.down": {"bits": 8, "block_size": 48}},
            "blocks of 48; onnxruntime supports",
        ),
        (
            {"layers.0.mlp.down": {"bits": 8, "blocks": 48}},
            "must be an object with the keys bits, block_size",
        ),
        ({"layers.0.mlp.down": 8}, "must be an object"),
        (
            {"layers.0.mlp.down": dataclasses.asdict(TWO_PLANES)},
            "splits layers.0.mlp.down in 2 planes, but only embedding tables can",
        ),
        ({"token_embedding": {"bits": 8, "block_size": 64}}, "does not divide"),
        ([1], "a plan must be a JSON object"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(tiny, entries, message):
    with pytest.raises(ExportRequestError, match=message):
        plan_from_json(entries, tiny("gemma3").config)


@pytest.mark.spread
@each_generation
@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int4"])
def test_candidates_are_the_likeliest_tokens_and_their_logits(tiny, generation, recipe, tmp_path):
    model = tiny(generation)
    arguments = {"calibration": "none"} | ({"kl_budget": 100.0} if recipe == "int4" else {})
    path = export_onnx(model.folder, tmp_path / "b", recipe, verify=False, **arguments).path
    bundle = Bundle.open(path)
    whole, engine = Engine(bundle, threads=1), CandidateEngine(bundle, threads=1)
    ids = random_rows(1, 30)[0].tolist()
    for logits, found in [
        (whole.prefill(ids), engine.prefill(ids)),
        (whole.decode(5), engine.decode(5)),
    ]:
        assert len(found.ids) == bundle.num_candidates == 256
        assert len(set(found.ids.tolist())) == 256
        order = np.argsort(-found.logits)
        best = np.argsort(-logits)[:100]
        # The low plane's part of candidates has float activations, that of all logits rounded ones.
        close = 0.15 if recipe in ("int4", "int8") else 1e-4
        np.testing.assert_allclose(
            found.logits[order[:100]], logits[best], atol=close * logits.std()
        )
        assert set(best[:50].tolist()) <= set(found.ids.tolist())
