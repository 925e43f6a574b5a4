"""The restart with huge pages, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edge_demo.device.huge_pages import of_use

CODE = """
import os, sys
from edge_demo.device import huge_pages
if huge_pages.of_use():
    huge_pages.restart_with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:], sys.stdin.read(), sep="|")
"""


def run(environment):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE, "two words", "--json"],
        input="a prompt",
        env={k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    return result.stdout.strip().split("|")


def test_a_command_starts_again_once_with_its_arguments_and_its_input():
    setting, *others = run({})
    wanted = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=262144"
    assert setting == (wanted if of_use({}) else "None")
    assert others == ["two words", "--json", "a prompt"]


def test_tunables_that_somebody_has_set_are_left_alone():
    setting, *others = run({"GLIBC_TUNABLES": "glibc.malloc.perturb=0"})
    assert setting == "glibc.malloc.perturb=0"
    assert others == ["two words", "--json", "a prompt"]


@pytest.mark.parametrize(
    "policy, wanted",
    [
        ("always [madvise] never", True),
        ("[always] madvise never", False),  # it has them already
        ("always madvise [never]", False),
        (None, False),  # a kernel without them
    ],
)
def test_only_where_memory_has_to_ask_for_them(tmp_path, policy, wanted):
    path = tmp_path / "enabled"
    if policy is not None:
        path.write_text(policy + "\n")
    on_linux = sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION") >= "glibc 2.35"
    assert of_use({}, path) == (wanted and on_linux)
