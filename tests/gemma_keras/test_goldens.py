"""Logits and hidden states against those that transformers and KerasHub computed: goldens, and live.

All read one folder, each with its own code. The goldens need neither project to run; the tests
marked `peer` run both again and compare every logit. `benchmarks/agreement.py` prints the figures.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests import agreement
from tests.agreement import AS_27B, CASES, IDS, TOLERANCE, read_golden
from tests.models import GENERATIONS, WINDOW, relative_difference

PEERS = ("transformers", "keras_hub")
LOCAL = ["sliding_attention"]
each_case = pytest.mark.parametrize("case", CASES)
each_peer = pytest.mark.parametrize("peer", PEERS)
once = pytest.mark.backends("torch")  # the goldens are compared on all of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A case to its Hugging Face folder, each written once."""
    base = tmp_path_factory.mktemp("agreement")
    return functools.cache(lambda case: agreement.write_folder(base / case, CASES[case]))


@pytest.fixture(scope="module")
def ours(folder):
    """A case to our outputs."""
    return functools.cache(lambda case: agreement.run_here(folder(case), IDS))


@pytest.fixture(scope="module")
def live(folder):
    """A case and a peer to the outputs of that peer, today."""

    @functools.cache
    def run(case, peer):
        if peer == "keras_hub":
            return agreement.run_by_keras_hub(folder(case), IDS)
        model = agreement.read_by_transformers(folder(case))
        return agreement.run_by_transformers(model, IDS)

    return run


# --- goldens -------------------------------------------------------------------------------------


@each_case
def test_the_weights_are_those_that_the_golden_was_made_of(case):
    golden = read_golden(case)
    assert golden["config"] == CASES[case]
    assert golden["token_ids"] == IDS.tolist()
    weights = agreement.seeded_weights(golden["config"], golden["seed"])
    assert agreement.digest(weights.items()) == golden["weights_sha256"]


@pytest.mark.keras
@each_peer
@each_case
def test_outputs_are_those_of_the_golden(ours, case, peer, record_property):
    difference = agreement.distance(ours(case), read_golden(case)[peer])
    record_property(f"{case}, golden of {peer}, greatest difference / spread", f"{difference:.1e}")
    assert difference < TOLERANCE


# What a reader of configurations or a layer may get wrong, and in which cases.
MISTAKES = {
    "query scale": ({"query_pre_attn_scalar": 32}, AS_27B),
    "soft cap of scores": ({"attn_logit_softcapping": None}, ("gemma2",)),
    "soft cap of logits": ({"final_logit_softcapping": None}, ("gemma2",)),
    "window": ({"sliding_window": WINDOW + 1}, ("gemma2", "gemma3")),
    "which layers have one": ({"layer_types": ["full_attention", *LOCAL * 7]}, ("gemma3",)),
    "scale of positions": ({"rope_scaling": None}, ("gemma3",)),
    "base of local positions": ({"rope_local_base_freq": 20_000.0}, ("gemma3",)),
    "base of positions": ({"rope_theta": 20_000.0}, ("gemma", "gemma2", "gemma3")),
    "epsilon": ({"rms_norm_eps": 1e-3}, ("gemma", "gemma2", "gemma3")),
}


@pytest.mark.keras
@pytest.mark.spread
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_mistake_shows_in_the_goldens(generation, tmp_path, record_property):
    """With one entry of a configuration changed, no golden is met."""
    off = {}
    for mistake, (change, cases) in MISTAKES.items():
        for case in cases:
            if case.partition(" ")[0] == generation:
                config = CASES[case] | change
                folder = agreement.write_folder(tmp_path / f"{case} {mistake}", config)
                found = agreement.run_here(folder, IDS)
                golden = read_golden(case)["transformers"]
                off[mistake] = agreement.distance(found, golden)
    mistake, least = min(off.items(), key=lambda item: item[1])
    figure = f"{least:.1e} ({mistake}), of {len(off)}"
    record_property(f"{generation}, the least that a mistake is off its golden", figure)
    assert least > 20 * TOLERANCE


# --- live ----------------------------------------------------------------------------------------


@once
@pytest.mark.keras
@pytest.mark.peer
@each_peer
@each_case
def test_every_output_is_that_of_the_live_peer(ours, live, case, peer, record_property):
    found, expected = ours(case), live(case, peer)
    difference = max(map(relative_difference, found, expected))
    record_property(f"{case}, live {peer}, greatest difference / spread", f"{difference:.1e}")
    assert difference < TOLERANCE


@once
@pytest.mark.keras
@pytest.mark.peer
@each_peer
@each_case
def test_the_golden_is_what_the_peer_computes_today(live, case, peer):
    assert agreement.distance(live(case, peer), read_golden(case)[peer]) < TOLERANCE / 10


@once
@pytest.mark.keras
@pytest.mark.peer
@pytest.mark.parametrize("case", AS_27B)
def test_keras_hub_as_it_comes_does_not_scale_queries_of_27b(folder, live, case, record_property):
    """When this fails KerasHub has mended it, and nothing needs to be told any more."""
    found = agreement.run_by_keras_hub(folder(case), IDS, tell_attention=False)
    difference = relative_difference(found.logits, live(case, "transformers").logits)
    record_property(f"{case}, KerasHub as it comes, from transformers", f"{difference:.2f}")
    np.testing.assert_allclose(difference, read_golden(case)["keras_hub"]["as_it_comes"], rtol=0.01)
    assert difference > 100 * TOLERANCE
