"""What is counted on emulated boards: how counts are read, and that a token's have not grown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_demo.device.boards import BOARDS, board_named
from tools.arm64 import user_space
from tools.arm64.user_space import PROCESSORS, SetupError
from tools.count_arm64 import counts, emulator
from tools.count_arm64.__main__ import bound, count_bundle, figures
from tools.count_arm64.plan import Plan

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "goldens" / "instructions.json"
SMALL = Plan(prompts=(16, 32), tokens=2, shallow=8, depth=40)
MOST_GROWTH = 1.05
LEAST_GROWTH = 0.7  # an improvement that the golden should know


def test_counts_are_the_median_of_marks_of_a_name(tmp_path):
    (tmp_path / "counts").write_text("mark 0 7\nmark 1 10\n4005 2 aa bb\nmark 2 30\nmark 3 20\n")
    totals = counts.read_totals(tmp_path / "counts")
    assert totals == [7, 10, 30, 20]
    assert counts.by_name(["", "a", "a", "b"], totals) == {"a": 20, "b": 20}
    with pytest.raises(ValueError, match=r"shorter|longer"):
        counts.by_name(["a"], totals)


@pytest.mark.parametrize("text", ["", "mark 1 7\n", "mark 0\n"])
def test_a_file_that_is_not_whole_is_refused(tmp_path, text):
    (tmp_path / "counts").write_text(text)
    with pytest.raises(ValueError, match=r"lacks mark 0|holds no marks"):
        counts.read_totals(tmp_path / "counts")


def test_a_plan_survives_a_command_line():
    assert Plan.from_words(SMALL.words()) == SMALL


def test_figures_leave_the_last_token_out_of_a_prompt():
    plan = Plan(prompts=(4, 11), tokens=1, shallow=10, depth=30)
    found = {"prompt of 4": 1e6, "prompt of 11": 25e6, "token after 10": 5e6,
             "token after 30": 7e6, "peak_bytes": 3.0}  # fmt: skip
    assert figures(found, plan) == {"token": 5, "prompt": 2, "position": 100, "peak": 3}


def test_a_bound_is_what_is_shorter_of_memory_and_instructions():
    board = board_named("Raspberry Pi 4 Model B Rev 1.5")
    assert board is BOARDS[1] and board_named("Something else") is board_named(None) is None
    assert bound(board, 100_000_000, 1.0) == 40
    assert bound(board, 1, 600e6) == 10


def test_an_emulator_without_plugins_is_refused(tmp_path):
    program = tmp_path / "qemu-aarch64"
    program.write_text("#!/bin/sh\necho \"qemu: unknown option 'plugin'\" >&2; exit 1\n")
    program.chmod(0o755)
    with pytest.raises(SetupError, match=r"cannot load the plugin.*qemu-user"):
        emulator.Emulator((str(program),), tmp_path / "plugin.so").try_out()


@pytest.mark.parametrize("recipe", ["int4", "int8", "rows", "board-int8"])
def test_a_token_of_a_small_model_takes_no_more_instructions_than_before(
    recipe, tiny_bundles, record_property
):
    """The golden is made anew by taking a recipe's lines out of it and running this test twice."""
    try:
        emulated = emulator.build(ROOT / "build" / "count-arm64", print)
        space = user_space.build(ROOT / "build" / "arm64", print, emulated.qemu)
    except SetupError as error:
        pytest.skip(f"an emulated board cannot be fetched here: {error}")
    golden = json.loads(GOLDEN.read_text())
    new = {}
    for processor in PROCESSORS:
        found = count_bundle(emulated, space, processor, tiny_bundles / f"wide-{recipe}", SMALL)
        for name in (SMALL.prompt_name(32), SMALL.token_name(8)):
            key = f"{recipe}, {processor.name}, {name}"
            record_property(key, f"{found[name]:,.0f} instructions")
            new[key] = round(found[name])
    if not golden.keys() & new.keys():
        GOLDEN.write_text(json.dumps(golden | new, indent=1) + "\n")
        pytest.fail(f"{GOLDEN.name} had no {recipe}; it has now: look at it, and run again")
    for key, count in new.items():
        grown = count / golden[key]
        assert grown <= MOST_GROWTH, f"{key}: {grown:.3f} times the instructions of before"
        assert grown >= LEAST_GROWTH, f"{key}: {grown:.3f} times; make the golden anew"
