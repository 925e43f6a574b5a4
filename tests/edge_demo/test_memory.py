"""What a bundle takes beside what is estimated, and real limits around real commands."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from edge_demo.bundle.graph_weights import stored_weights
from edge_demo.bundle.reader import Bundle
from edge_demo.device.memory_limits import _VERSION_1, control_group_limits, memory_limits
from edge_demo.device.system_files import read_sizes
from edge_demo.engine import float_prompts, low_plane, memory
from edge_demo.engine.cache_size import cache_bytes
from edge_demo.engine.kv_cache import KVCache
from tests.conftest import ROOT

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux")
MB = 10**6

# A Raspberry Pi 5 of 4 GB that does some work.
MEMINFO = """\
MemTotal:        4147616 kB
MemFree:          812344 kB
MemAvailable:    2921036 kB
SwapTotal:        524272 kB
SwapFree:         524272 kB
HugePages_Total:       0
"""


# --- the estimate --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 256, 257, 10_000])
@pytest.mark.parametrize("name", ["gemma-int8", "gemma2-fp32", "gemma3-int8"])
def test_cache_bytes_are_those_of_the_cache(tiny_bundles, name, tokens):
    bundle = Bundle.open(tiny_bundles / name)
    cache = KVCache(bundle.engine, bundle.ropes, bundle.windows, bundle.context_length)
    cache.reserve(min(tokens, bundle.context_length))
    expected = cache_bytes(
        bundle.engine, bundle.ropes, bundle.windows, bundle.context_length, tokens
    )
    assert cache.num_bytes == expected > 0


def test_longer_contexts_and_chunks_take_more(tiny_bundles):
    bundle = Bundle.open(tiny_bundles / "gemma2-fp32")
    small = memory.estimate(bundle, context=8, chunk=4)
    assert memory.estimate(bundle, context=8, chunk=8).activations > small.activations
    assert memory.estimate(bundle, context=8, chunk=8, logit_rows=9).activations > small.activations
    assert small.process < small.anonymous < small.resident <= small.peak
    assert small.anonymous < small.data < small.address_space


@pytest.mark.parametrize("name", ["gemma-int8", "gemma2-fp32", "gemma3-int8"])
def test_no_table_is_looked_up_and_the_peak_may_be_that_of_loading(tiny_bundles, name):
    bundle = Bundle.open(tiny_bundles / name)
    for graph in (bundle.engine, bundle.candidates):
        needed = memory.estimate(bundle, graph)
        weights = stored_weights(bundle.path / graph.file)
        assert needed.lookups == sum(w.num_bytes for w in weights if w.looked_up) == 0
        in_planes = "int8" in name and graph is bundle.candidates
        kept = low_plane.memory_needed(bundle.embedding, bundle.num_candidates) if in_planes else 0
        assert needed.low_plane == kept and (kept > 0) == in_planes
        without = dataclasses.replace(needed, low_plane=0)
        assert needed.anonymous == without.anonymous + kept
        sizes = [w.num_bytes for w in weights if w.multiplied]
        assert needed.copied_from == max(sizes) < needed.weights
        larger = dataclasses.replace(needed, copied_from=needed.peak)
        assert larger.peak == needed.peak + memory._LIBRARIES + needed.process + needed.weights
        assert larger.anonymous == needed.anonymous and larger.resident == needed.resident


MEASURE = """
import json, sys, threading
import numpy as np
from edge_demo import Bundle
from edge_demo.engine import memory
from edge_demo.text.generator import engine_for
from edge_demo.text.sampling import Sampler
from edge_demo.device.system_files import read_sizes
from edge_demo.text.tokenizer import Tokenizer
bundle = Bundle.open(sys.argv[1])
needed, _ = memory.fitting(bundle)
tokenizer, engine = Tokenizer(bundle), engine_for(bundle, Sampler(), 1)
ids = np.random.default_rng(0).integers(0, bundle.vocabulary_size, 1000).tolist()
found = []
def look(ended):
    while not ended.wait(0.005):
        with open("/proc/self/status") as file:
            found.append(read_sizes(file.read()))
ended = threading.Event()
looking = threading.Thread(target=look, args=[ended])
looking.start()
for _ in range(2):
    engine.rewind(0)
    engine.prefill(ids)
ended.set()
looking.join()
most = [max(status[field] for status in found) for field in ("RssAnon", "VmHWM")]
print(json.dumps([needed.anonymous, most[0], needed.peak, most[1]]))
"""


def measured(bundle, **options):
    command = [sys.executable, "-W", "error", "-c", MEASURE, str(bundle)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@linux
@pytest.mark.sample
@pytest.mark.parametrize("in_float", [False, True])
def test_the_estimate_for_the_sample_is_within_fifteen_percent(
    sample_bundle, in_float, record_property
):
    environment = os.environ | {float_prompts.VARIABLE: str(int(in_float))}
    anonymous, has, peak, reached = measured(sample_bundle, env=environment)
    record_property(
        f"estimated and measured, MB{', prompts in float32' * in_float}",
        [n // MB for n in (anonymous, has, peak, reached)],
    )
    assert anonymous == pytest.approx(has, rel=0.15)
    assert peak == pytest.approx(reached, rel=0.15)


# --- what there is -------------------------------------------------------------------------------


def fake(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_sizes_are_read_in_bytes():
    sizes = read_sizes(MEMINFO)
    assert sizes["MemAvailable"] == 2921036 * 1024
    assert "HugePages_Total" not in sizes  # a count
    assert read_sizes("nonsense\n:\nMemFree: many kB\n") == {}


def group(limit, usage, inactive=0, active=0, version=2):
    names = ("memory.max", "memory.current") if version == 2 else _VERSION_1[:2]
    prefix = "" if version == 2 else "total_"
    stat = f"anon 5\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\n"
    return {names[0]: f"{limit}\n", names[1]: f"{usage}\n", "memory.stat": stat}


def test_the_tightest_of_nested_control_groups_counts(tmp_path):
    files = {"proc/self/cgroup": "0::/user.slice/service\n", "proc/meminfo": MEMINFO}
    for folder, found in (
        ("", {}),  # the root group has no limit
        ("user.slice/", group(600 * MB, 500 * MB, inactive=150 * MB, active=50 * MB)),
        ("user.slice/service/", group("max", 100 * MB)),
    ):
        files |= {f"sys/fs/cgroup/{folder}{name}": text for name, text in found.items()}
    root = fake(tmp_path, files)
    assert [r for r in control_group_limits(root) if r is not None] == [300 * MB]
    by_bound = {room.bound: room.free for room in memory_limits(root)}
    assert by_bound["in its control group"] == 300 * MB
    assert by_bound["of the device"] == 2921036 * 1024
    (root / "sys/fs/cgroup/user.slice/service/memory.max").write_text(f"{150 * MB}\n")
    assert min(r for r in control_group_limits(root) if r is not None) == 50 * MB


def test_control_groups_of_version_1_are_read_too(tmp_path):
    files = {"proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/box/inner\n0::/\n"}
    for folder, found in (
        ("", group(9223372036854771712, 0, version=1)),
        ("box/", group(512 * MB, 300 * MB, inactive=80 * MB, version=1)),
        ("box/inner/", group(9223372036854771712, 10 * MB, version=1)),
    ):
        files |= {f"sys/fs/cgroup/memory/{folder}{name}": text for name, text in found.items()}
    assert [r for r in control_group_limits(fake(tmp_path, files)) if r] == [292 * MB]


def test_a_full_group_has_no_room_and_a_strange_one_is_passed_over(tmp_path):
    root = fake(
        tmp_path,
        {"proc/self/cgroup": "nonsense\n0::/a\n"}
        | {f"sys/fs/cgroup/a/{name}": text for name, text in group(10 * MB, 11 * MB).items()},
    )
    assert [r for r in control_group_limits(root) if r is not None] == [0]
    (root / "sys/fs/cgroup/a/memory.current").write_text("many\n")
    assert [r for r in control_group_limits(root) if r is not None] == []


def test_a_system_without_proc_is_no_reason_to_refuse(tmp_path):
    bounds = [room.bound for room in memory_limits(tmp_path)]
    assert "of the device" not in bounds and "in its control group" not in bounds


# --- real limits ---------------------------------------------------------------------------------


def limited(kind, num_bytes, *arguments, **environment):
    """Run a command under a limit of the kernel: exit status, stdout and stderr."""
    code = (
        "import os, resource, sys; n = int(sys.argv[2]);"
        "resource.setrlimit(getattr(resource, sys.argv[1]), (n, n));"
        "os.execv(sys.executable, [sys.executable, '-m', 'edge_demo.cli.main', *sys.argv[3:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, kind, str(num_bytes), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@linux
@pytest.mark.limits
@pytest.mark.parametrize("kind", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_what_cannot_fit_is_refused_with_both_figures(tiny_bundles, kind):
    bundle = tiny_bundles / "gemma3-int8"
    generate = ("generate", bundle, "--prompt", "The", "--max-tokens", 2)
    needed = memory.estimate(Bundle.open(bundle), chunk=memory.CHUNKS[-1])
    figure = {"RLIMIT_DATA": needed.data, "RLIMIT_AS": needed.address_space}[kind]
    status, out, err = limited(kind, figure - 20 * MB, *generate)
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert f"about {figure / MB:.0f} MB" in err and kind in err and "--force" in err
    assert int(err.split(" MB is available")[0].split()[-1]) <= (figure - 10 * MB) // MB
    # it was an estimate, on the safe side for so small a model
    status, out, err = limited(kind, figure - 20 * MB, *generate, "--force")
    assert status == 0, err
    assert out.startswith("The")
    assert limited(kind, figure + 100 * MB, *generate)[1] == out


@linux
@pytest.mark.limits
@pytest.mark.sample
def test_the_sample_is_refused_where_it_cannot_fit_and_runs_where_it_does(sample_bundle):
    needed = memory.estimate(Bundle.open(sample_bundle), chunk=memory.CHUNKS[-1])
    generate = ("generate", sample_bundle, "--prompt", "1, 2, 3, 4, 5, 6,", "--max-tokens", 4)
    status, out, err = limited("RLIMIT_DATA", needed.data - 40 * MB, *generate)
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert f"{needed.data / MB:.0f} MB" in err and "Gemma 3 270m (int8)" in err
    status, out, err = limited("RLIMIT_DATA", needed.data + 30 * MB, *generate)
    assert status == 0, err
    assert out.startswith("1, 2, 3, 4, 5, 6, 7,")


@linux
@pytest.mark.limits
def test_huge_pages_are_not_asked_for_where_memory_is_short(tiny_bundles):
    bundle = tiny_bundles / "gemma3-int8"
    code = (
        "import resource, sys; from edge_demo.engine.memory import is_short; n = int(sys.argv[2]);"
        "print(is_short(sys.argv[1])); resource.setrlimit(resource.RLIMIT_DATA, (n, n));"
        "print(is_short(sys.argv[1]), is_short('nowhere'))"
    )
    needed = memory.estimate(Bundle.open(bundle), chunk=memory.CHUNKS[-1]).data
    command = [sys.executable, "-W", "error", "-c", code, str(bundle), str(needed - 10 * MB)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.split() == ["False", "True", "False"]
