"""The page about what only `make test-all` runs, from `tests/slow.py`."""

from __future__ import annotations

from tests.slow import SLOW, Slow

_HEAD = """\
# Tests

`make test` runs the quick tests on JAX, TensorFlow and PyTorch. `make test-all`, which CI runs,
adds the tests below. A Keras test runs on each backend; everything else runs once. `tests/slow.py`
is the list; this page is made from it.

`pytest -m walk` exports every published size with every recipe, at reduced width. Run it by hand;
it takes six minutes.

## Only in `make test-all`
"""


def page() -> str:
    """The content of `docs/reference/tests.md`."""
    return "\n".join([_HEAD, *map(_section, SLOW)])


def _section(slow: Slow) -> str:
    where = f" On {' and '.join(slow.backends)}:" if slow.backends else ""
    names = [f"* `tests/{name}`" for name in slow.tests]
    return "\n".join([f"**{slow.why}**{where}", "", *names, ""])
