"""What `make test-arm64` concludes from what it sees, and how it makes its user space."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_demo.engine.candidates import Candidates
from edge_demo.text.sampling import Sampler
from tools.arm64 import user_space
from tools.arm64.agree import compare
from tools.arm64.observe import Observation, WatchedSampler

ROOT = Path(__file__).parents[1]


def observation(answers, margins, logits) -> Observation:
    machine, version, texts = "aarch64", "1", [""] * len(answers)
    return Observation(machine, version, answers, margins, texts, 0, [], np.float32(logits))


# --- what is concluded ---------------------------------------------------------------------------

ROWS = [[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]]
MOVED = [[3.0, 1.25, 0.0], [0.0, 2.0, 1.0]]  # by 0.25


def test_the_noise_is_the_greatest_difference_and_kl_is_that_of_the_formula():
    here, there = observation([[1]], [[9.0]], ROWS), observation([[1]], [[9.0]], MOVED)
    found = compare(here, there)
    p, q = (np.exp(r) / np.exp(r).sum() for r in (np.array(ROWS[0]), np.array(MOVED[0])))
    assert found.noise == 0.25
    assert found.kl == pytest.approx((p * np.log(p / q)).sum() / 2, rel=1e-6)
    assert (found.same, found.tokens, found.same_top_token) == (1, 1, 1.0)
    assert found.partings == ()


@pytest.mark.parametrize("margin, clear", [(0.49, False), (0.51, True)])
@pytest.mark.parametrize("theirs", [[5, 7, 7], [5]], ids=["another token", "an early end"])
def test_a_parting_is_clear_where_twice_the_noise_does_not_explain_it(margin, clear, theirs):
    here = observation([[1, 2], [5, 6, 7]], [[9.0, 9.0], [9.0, margin, 9.0]], ROWS)
    found = compare(here, observation([[1, 2], theirs], [], MOVED))
    assert found.partings == ((1, 1, margin),)
    assert (found.same, found.tokens) == (3, 5)
    assert found.clear_partings == ([(1, 1, margin)] if clear else [])


def test_an_end_that_the_other_does_not_see_is_judged_by_the_stop_tokens_margin():
    here, there = observation([[5]], [[9.0, 0.75]], ROWS), observation([[5, 6]], [], MOVED)
    assert compare(here, there).clear_partings == [(0, 1, 0.75)]


def test_another_logit_at_the_top_is_counted():
    there = observation([[1]], [[9.0]], [ROWS[0], [0.0, 1.0, 2.0]])
    assert compare(observation([[1]], [[9.0]], ROWS), there).same_top_token == 0.5


def test_observations_of_other_arguments_are_refused():
    with pytest.raises(ValueError, match="same arguments"):
        compare(observation([[1]], [[9.0]], ROWS), observation([[1]], [[9.0]], ROWS[:1]))


# --- what is observed ----------------------------------------------------------------------------


def test_a_watched_sampler_chooses_as_any_and_keeps_its_margins():
    logits = np.float32([1.0, 4.0, 2.5, -1.0])
    candidates = Candidates(np.array([3, 2, 1]), logits[[3, 2, 1]])
    sampler = WatchedSampler()
    for given in (logits, candidates):
        assert sampler.pick(given) == Sampler().pick(given) == 1
    assert sampler.margins == [1.5, 1.5]


def test_a_bundle_observed_twice_agrees_with_itself(tmp_path, tiny_bundles):
    seen = []
    for name in ("once", "again"):
        command = [sys.executable, "-m", "tools.arm64.observe", tiny_bundles / "gemma3-int8"]
        command += [tmp_path / name, "--max-tokens", "8", "--positions", "40", "--threads", "1"]
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        subprocess.run(command, cwd=ROOT, check=True, env=environment)
        seen.append(Observation.read(tmp_path / name))
    assert seen[0].logits.shape == (40, 300)
    assert all(len(m) >= len(a) for m, a in zip(seen[0].margins, seen[0].answers, strict=True))
    assert "onnxruntime" in seen[0].modules and "keras" not in seen[0].modules
    found = compare(*seen)
    assert (found.noise, found.partings) == (0, ())
    assert found.same == found.tokens > 0


# --- the user space ------------------------------------------------------------------------------


def test_what_is_missing_is_named_with_its_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["user_space", str(tmp_path / "arm64")])
    assert user_space.main() == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "apt-get install qemu-user-static" in err
    assert not (tmp_path / "arm64").exists()


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path):
    folder = tmp_path / "system"

    def make(content):
        return lambda new: (new / "file").write_text(content)

    def fail(new):
        make("half")(new)
        raise user_space.SetupError("the network is gone")

    with pytest.raises(user_space.SetupError):
        user_space.make(folder, ["a"], fail)
    assert not folder.exists()
    user_space.make(folder, ["a"], make("whole"))
    user_space.make(folder, ["a"], fail)  # is there already
    assert (folder / "file").read_text() == "whole"
    with pytest.raises(user_space.SetupError):
        user_space.make(folder, ["b"], fail)
    user_space.make(folder, ["b"], make("another"))
    assert (folder / "file").read_text() == "another"
    assert [path.name for path in tmp_path.iterdir()] == ["system"]
