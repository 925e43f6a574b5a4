"""Fixtures of the device's tests: bundles to be spoiled, generators, commands that run here."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.cli.main import main
from edge_demo.engine import cache_size, memory, prompt_chunks
from edge_demo.engine.binding import Binding
from edge_demo.engine.runner import Engine
from edge_demo.text.generator import Generator
from edge_demo.text.tokenizer import Tokenizer
from tests.edge_demo.bundle_files import copy_bundle


@pytest.fixture
def damaged(tiny_bundles, tmp_path):
    """A good bundle, to be spoiled."""
    return copy_bundle(tiny_bundles / "gemma3-fp32", tmp_path / "damaged")


@pytest.fixture
def damaged_int8(tiny_bundles, tmp_path):
    return copy_bundle(tiny_bundles / "gemma3-int8", tmp_path / "damaged")


@pytest.fixture(scope="session")
def sample_generator(sample_bundle) -> Generator:
    return generator(sample_bundle)


@pytest.fixture(scope="package", autouse=True)
def users_environment(tmp_path_factory):
    """What is remembered of checked files and typed texts is for these tests only; output is
    buffered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.delenv("PYTHONUNBUFFERED", raising=False)
        yield


def generator(bundle: Path) -> Generator:
    """On an engine of its own."""
    opened = Bundle.open(bundle)
    return Generator(Engine(opened, threads=1), Tokenizer(opened))


@contextlib.contextmanager
def short_boundaries(step: int, slack: int, chunk: int) -> Iterator[None]:
    """Buffers that grow in `step`, windows with `slack`, prompts in chunks: a short text meets all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_size, "STEP", step)
        patch.setattr(cache_size, "SLACK", slack)
        patch.setattr(memory, "CHUNKS", (chunk,))
        patch.setattr(memory, "FLOAT_CHUNK", chunk)
        patch.setattr(prompt_chunks, "UNIT", chunk)
        yield


@contextlib.contextmanager
def interrupted_runs() -> Iterator[None]:
    """Ctrl-C, which is noticed when onnxruntime returns: the buffers have the new tokens already."""
    run = Binding.run

    def interrupted(binding: Binding) -> None:
        run(binding)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Binding, "run", interrupted)
        yield


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture
def run(capfd):
    """Run a command in this process: exit status, stdout and stderr."""

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = exit_.code
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def run_json(run):
    """Run a command that must succeed: the object on its last line of stdout."""

    def run_json(*arguments):
        status, out, err = run(*arguments, "--json")
        assert (status, err) == (0, "")
        return json.loads(out.splitlines()[-1])

    return run_json


@pytest.fixture
def refused(run):
    """Run a command that must be refused in one line on stderr, which names some things."""

    def refused(*arguments, names, status=2):
        found, out, err = run(*arguments)
        assert found == status
        assert err.count("\n") == 1 and err.startswith("edge-demo"), err
        assert out == ""
        for name in names:
            assert str(name) in err

    return refused
