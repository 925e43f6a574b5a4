"""What only `make test-all` runs, and why: tests that take long for what they add.

Data: for each reason the tests, as `file::test` below `tests/`, a file alone meaning all of it. A
reason with backends counts on these alone: there the test shows what another backend shows too.
"""

from __future__ import annotations

from typing import NamedTuple

OTHERS = ("jax", "tensorflow")


class Slow(NamedTuple):
    """Why tests wait for `make test-all`.

    Attributes:
        why: a sentence.
        tests: beginnings of their names.
        backends: on which; none means wherever they run.
    """

    why: str
    tests: tuple[str, ...]
    backends: tuple[str, ...] = ()


SLOW = (
    Slow(
        "The Keras code is the same on every backend; what differs is tested on all three.",
        (
            "gemma_keras/test_finite.py",
            "gemma_keras/test_arguments.py",
            "gemma_keras/test_text_embedder.py",
            "gemma_keras/test_keras_hub.py",
            "export/test_rounding.py",
            "export/test_balance.py",
            "export/test_report.py",
        ),
        OTHERS,
    ),
    Slow(
        "The real weights take minutes; one length and one prompt show the same in seconds.",
        (
            "gemma_keras/test_sample.py",
            "edge_demo/test_memory.py::test_the_estimate_for_the_sample",
            "edge_demo/test_batch.py::test_the_real_model",
            "edge_demo/test_courses.py::test_the_real_model",
            "edge_demo/test_prompt_cache.py::test_the_real_model",
        ),
    ),
    Slow(
        "Processes that train together, are killed, or run until memory is counted.",
        (
            "gemma_keras/test_distribute.py",
            "gemma_keras/test_loading.py::test_a_table_is_never_twice_in_memory",
            "edge_demo/test_batch.py::test_whatever_kills_it",
        ),
    ),
    Slow(
        "Thousands of damaged files; each kind of damage has a test of its own.",
        (
            "edge_demo/test_manifest.py::test_any_change_of_the_manifest",
            "edge_demo/test_hostile_values.py",
            "edge_demo/test_prompt_cache_option.py::test_what_is_no_prompt_cache",
        ),
    ),
    Slow(
        "All sizes at full width; small models show the same of each architecture.",
        ("gemma_keras/test_parameter_counts.py::test_the_keras_model_of_every_size",),
    ),
)


def is_slow(nodeid: str, backend: str) -> bool:
    """Whether a test is one of them.

    Args:
        nodeid: pytest's name of it.
        backend: that Keras runs on here.
    """
    name = nodeid.removeprefix("tests/")
    return any(
        name.startswith(slow.tests) and (not slow.backends or backend in slow.backends)
        for slow in SLOW
    )
