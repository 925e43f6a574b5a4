"""Numbers in JSON end; digits elsewhere are free."""

import numpy as np
import pytest

from edge_demo.text.json_numbers import MOST_DIGITS, NumberWatch

LONG = b"7" * MOST_DIGITS


@pytest.mark.parametrize(
    ("text", "too_long"),
    [
        (b'{"a": ' + LONG, True),
        (LONG, True),
        (b"[1, -0." + LONG[3:], True),
        (b'```json\n{"a": ' + LONG, True),
        (b'{"a": "' + LONG, False),
        (b'{"a": "\\"' + LONG, False),
        (b'{"a": ' + LONG[1:], False),
        (b'{"a": ' + LONG[1:] + b", ", False),
        (b"In prose: " + LONG, False),
    ],
)
def test_a_long_number_takes_no_more_digits(text, too_long):
    digits = np.array([5, 6], np.int32)
    watch = NumberWatch(digits)
    for place in range(0, len(text), 3):
        watch.take(text[place : place + 3])
    assert (watch.forbidden is digits) == too_long
