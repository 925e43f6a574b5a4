"""What TensorFlow is told before it starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os, sys
from export.start_keras import start_keras
from gemma_keras import named_config
start_keras(named_config(sys.argv[1]))
print(os.environ.get("TF_ENABLE_ONEDNN_OPTS"))
"""


@pytest.mark.parametrize(
    ("size", "asked", "expected"),
    [("gemma_7b", None, "0"), ("gemma_2b", None, "None"), ("gemma_7b", "1", "1")],
)
def test_onednn_is_off_where_its_memory_would_not_come_back(size, asked, expected):
    environment = {k: v for k, v in os.environ.items() if k != "TF_ENABLE_ONEDNN_OPTS"}
    if asked is not None:
        environment["TF_ENABLE_ONEDNN_OPTS"] = asked
    done = subprocess.run(
        [sys.executable, "-c", CODE, size], env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == expected, done.stderr
