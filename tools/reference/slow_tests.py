"""The page about what only `make test-all` runs, from `tests/slow.py`."""

from __future__ import annotations

from tests.slow import SLOW, Slow

_HEAD = """\
# Tests

`make test` runs the quick tests on JAX, TensorFlow and PyTorch. `make test-all`, which CI runs,
adds the tests below. A Keras test runs on each backend; everything else runs once. What no backend
can change runs on one: a test marked `spread` runs each of its cases on one backend, a test marked
`backends` runs on those it names.

`tests/slow.py` is the list; this page is made from it. A name is a beginning, in which `*` is any
text and `[[]` a bracket.

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
