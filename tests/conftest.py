"""One pytest run in five parts: Keras tests once on each backend, the device's, everything else.

`make test` starts an xdist worker for each part, whose environment holds `KERAS_BACKEND` and
`GEMMA_TEST_PART` (`keras`, `device` or `rest`). Plain `pytest` runs all in one process, Keras tests
on the backend of the environment.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import filelock
import pytest

from edge_demo import telemetry
from tests.models import GENERATIONS
from tests.slow import is_slow

ROOT = Path(__file__).parents[1]
BACKENDS = ("jax", "tensorflow", "torch")
telemetry.turn_off()  # tests import onnxruntime themselves
PART = os.environ.get("GEMMA_TEST_PART")
if PART:  # the parts share the processor
    for variable in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(variable, "1")
# A third of the time of these small models is JAX's compiler making them fast.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# And what it has compiled for one test, or in a run before, it need not compile for another.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / "build" / "jax-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell starts what runs in the background without Ctrl-C, which the commands that tests start and
# interrupt would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path):
    """In a worker, leave the files of other parts unread: importing them all takes a minute."""
    if not PART or not re.fullmatch(r"test_\w+\.py", collection_path.name):
        return None
    of_the_device = ROOT / "tests" / "edge_demo" in collection_path.parents
    if PART == "device" or of_the_device:
        return None if (PART == "device") == of_the_device else True
    text = collection_path.read_text(encoding="utf-8")
    _, _, marks = text.partition("\npytestmark = ")
    of_all = marks.partition("\n\n")[0]  # what every test of the file is marked with
    if PART == "rest":
        return True if "mark.keras" in of_all else None
    backends = re.search(r"mark\.backends\(([^)]*)\)", of_all)
    elsewhere = backends is not None and os.environ["KERAS_BACKEND"] not in backends[1]
    return True if elsewhere or "mark.keras" not in text else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Keep the tests that have a meaning on this backend; in a worker, those of its part, and of
    those marked `spread` its share."""
    backend = _running_backend()
    for item in items:
        its_backend = backend if "keras" in item.keywords else "none"
        if is_slow(item.nodeid, its_backend, item.fixturenames):
            item.add_marker("slow")
    wanted = [item for item in items if _has_a_meaning(item, backend)]
    if "walk" not in config.option.markexpr:  # takes minutes, and differs little from its like
        wanted = [item for item in wanted if "walk" not in item.keywords]
    if PART:
        wanted = [item for item in wanted if ("keras" in item.keywords) == (PART == "keras")]
    if PART == "keras":
        wanted = [item for item in wanted if _is_of_its_share(item, backend)]
    kept = set(wanted)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = wanted


def _has_a_meaning(item, backend: str) -> bool:
    marker = item.get_closest_marker("backends")
    return marker is None or backend in marker.args


def _is_of_its_share(item, backend: str) -> bool:
    """Whether this backend shows it: each of three shows one generation of those marked `spread`.

    With the name of a parameter in the mark, each shows every third of its values.
    """
    marker = item.get_closest_marker("spread")
    if marker is None:
        return True
    own = BACKENDS.index(backend)
    if marker.args:
        return item.callspec.indices[marker.args[0]] % len(BACKENDS) == own
    return item.callspec.params["generation"] == GENERATIONS[own]


# --- what really ran, in the summary -------------------------------------------------------------

_backends = pytest.StashKey[dict[str, str]]()


def _running_backend() -> str:
    """What Keras runs on here; in a Keras part whether or not a test has imported it."""
    keras = importlib.import_module("keras") if PART == "keras" else sys.modules.get("keras")
    return keras.config.backend() if keras else "none"


def pytest_configure(config):
    config.stash[_backends] = {}


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["backend"] = _running_backend()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """In the xdist controller: a worker has ended and says which backend it ran on."""
    output = getattr(node, "workeroutput", {})
    node.config.stash[_backends][node.gateway.id] = output.get("backend", "crashed")


def _worker(report) -> str:
    node = getattr(report, "node", None)
    return node.gateway.id if node else "main"


def pytest_terminal_summary(terminalreporter, config):
    """Say for each worker its backend, counts and time, its failures, and the figures recorded."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    seconds: Counter[str] = Counter()
    failures, figures = [], []
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if not isinstance(report, (pytest.TestReport, pytest.CollectReport)):
                continue
            worker = _worker(report)
            seconds[worker] += getattr(report, "duration", 0)
            if not outcome:  # a test's fixtures, made and taken away
                continue
            counts[worker][outcome] += 1
            if outcome in ("failed", "error"):
                failures.append(f"{worker}: {outcome}: {report.nodeid}")
            figures += [f"{worker}: {k}: {v}" for k, v in getattr(report, "user_properties", ())]
    terminalreporter.section("parts")
    for worker, backend in sorted(
        (config.stash[_backends] or {"main": _running_backend()}).items()
    ):
        outcomes = ", ".join(f"{n} {outcome}" for outcome, n in counts[worker].items())
        terminalreporter.write_line(
            f"{worker} (Keras backend: {backend}): {outcomes or 'no tests'}, {seconds[worker]:.0f} s"
        )
    for line in sorted(failures) + sorted(figures):
        terminalreporter.write_line(line)


# --- bundles -------------------------------------------------------------------------------------

# A machine that cannot export, such as an emulated device, is handed them: a folder that holds
# `tiny-bundles`, as `make_bundles` writes it, and for the tests marked `sample` also `sample-int8`.
HANDED_OVER = os.environ.get("GEMMA_TEST_BUNDLES")


def made_once(tmp_path_factory, name: str, module: str, *before: str, after: tuple = ()) -> Path:
    """The folder that `python -m MODULE *before FOLDER *after` makes, or that was handed over."""
    if HANDED_OVER:
        return Path(HANDED_OVER, name)
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_suffix(".partial")
            command = [sys.executable, "-m", module, *before, str(unfinished), *after]
            subprocess.run(command, cwd=ROOT, check=True)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundles(tmp_path_factory) -> Path:
    """A folder of the bundles that `make_bundles` writes."""
    return made_once(tmp_path_factory, "tiny-bundles", "tests.edge_demo.make_bundles")


@pytest.fixture(scope="session")
def tiny_guard(tmp_path_factory) -> Path:
    """A small guard, which `make_guard` tunes."""
    return made_once(tmp_path_factory, "tiny-guard", "tests.edge_demo.make_guard")


@pytest.fixture(scope="session")
def sample_bundle(tmp_path_factory) -> Path:
    """The real Gemma 3 270M as int8."""
    options = ("--recipe", "int8", "--no-verify")
    return made_once(tmp_path_factory, "sample-int8", "export.cli", "sample", after=options)


@pytest.fixture(scope="session")
def sample_chat_bundle(tmp_path_factory) -> Path:
    """The real Gemma 3 270M that was taught to answer, as int8."""
    options = ("--recipe", "int8", "--no-verify")
    return made_once(
        tmp_path_factory, "sample-chat-int8", "export.cli", "sample-chat", after=options
    )
