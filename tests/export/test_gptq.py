"""Rounding with error feedback, against a slow reading of the paper and against rounding alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.calibrate import gptq as rounding
from export.calibrate.gptq import feedbacks, gptq
from export.calibrate.input_statistics import InputStatistics
from export.formats.formats import Format
from export.formats.round_to_nearest import best_scales, round_to_nearest

FORMATS = [Format(4, 32, symmetric=False), Format(4, 16), Format(2, 32, symmetric=False)]


def problem(num_rows, num_inputs, seed, spread=1.0):
    """Rows, and inputs that are correlated and of uneven size: float32."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(num_inputs, num_inputs)) / np.sqrt(num_inputs)
    mix *= np.exp(spread * rng.normal(size=num_inputs))
    inputs = rng.normal(size=(4 * num_inputs, num_inputs)) @ (mix + 0.3 * np.eye(num_inputs))
    rows = rng.normal(size=(num_rows, num_inputs))
    return rows.astype(np.float32), inputs.astype(np.float32)


def moments_of(inputs):
    return InputStatistics([inputs.T @ inputs / np.float32(len(inputs))])


def output_error(quantized, fmt, rows, inputs):
    """Share of the outputs' energy that rounding changes."""
    difference = quantized.values(fmt, rows.shape[1]).astype(np.float64) - rows
    return np.square(inputs @ difference.T).mean() / np.square(inputs @ rows.T).mean()


def gptq_slowly(rows, hessian, fmt):
    """Algorithm 1 of the paper, an input at a time, the inverse Hessian updated by elimination."""
    num_rows, num_inputs = rows.shape
    hessian = hessian.astype(np.float64)
    importance = np.diag(hessian).astype(np.float32)
    blocks = rows.reshape(num_rows, -1, fmt.block_size)
    weight = (importance + importance.mean() * 1e-3).reshape(-1, fmt.block_size)
    scales, zeros = best_scales(blocks, weight, fmt)
    inverse = np.linalg.inv(hessian + 0.01 * np.trace(hessian) / num_inputs * np.eye(num_inputs))
    work = rows.astype(np.float64)
    levels = np.zeros(rows.shape, np.uint8)
    for j in np.argsort(-importance, kind="stable"):
        scale = scales[:, j // fmt.block_size].astype(np.float64)
        zero = fmt.middle if zeros is None else zeros[:, j // fmt.block_size].astype(np.float64)
        level = np.clip(np.rint(work[:, j] / scale) + zero, 0, (1 << fmt.bits) - 1)
        levels[:, j] = level
        error = (work[:, j] - (level - zero) * scale) / inverse[j, j]
        work -= np.outer(error, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return levels


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_levels_are_those_of_the_slow_algorithm(fmt, monkeypatch):
    monkeypatch.setattr(rounding, "_ROUNDS", 0)
    rows, inputs = problem(24, 192, seed=1)
    statistics = moments_of(inputs)
    found = gptq(rows, feedbacks(statistics), fmt)
    expected = gptq_slowly(rows, statistics.squares[0], fmt)
    # A value within float32's error of the middle between two levels may go either way, and what
    # follows in its row then differs by as little.
    different = found.levels.reshape(rows.shape) != expected
    assert different.mean() < 0.002


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_outputs_change_less_than_by_rounding_to_nearest(fmt):
    rows, inputs = problem(40, 256, seed=2)
    nearest = output_error(round_to_nearest(rows, fmt), fmt, rows, inputs)
    found = output_error(gptq(rows, feedbacks(moments_of(inputs)), fmt), fmt, rows, inputs)
    assert found < 0.6 * nearest


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_scales_and_levels_in_turns_lose_less(fmt, seed, monkeypatch):
    rows, inputs = problem(40, 200, seed)
    square = moments_of(inputs).squares[0].astype(np.float64)
    damping = 0.01 * np.trace(square) / len(square)

    def losses():
        """Of each row, with the damping that is rounded for."""
        difference = gptq(rows, feedbacks(moments_of(inputs)), fmt).values(fmt, 200) - rows
        return ((difference @ square + damping * difference) * difference).sum(axis=1)

    found = losses()
    monkeypatch.setattr(rounding, "_ROUNDS", 0)
    before = losses()
    assert (found < before * (1 + 1e-4)).all()
    assert found.sum() < 0.95 * before.sum()


def test_no_change_of_one_level_or_of_a_row_s_scales_loses_less():
    fmt, num_inputs = FORMATS[0], 96
    rows, inputs = problem(4, num_inputs, seed=7)
    (feedback,) = feedbacks(moments_of(inputs))
    square = feedback.square.astype(np.float64)
    start = gptq(rows, [feedback], fmt)
    for _ in range(8):  # on, until nothing changes
        start = rounding._refined(rows, start, feedback, fmt)
    zeros = np.repeat(start.zero_points.astype(float), fmt.block_size, axis=1)
    levels = start.levels.reshape(4, -1).astype(float)
    scales = np.repeat(start.scales.astype(float), fmt.block_size, axis=1)

    def loss(levels, scales):
        difference = (levels - zeros) * scales - rows
        return ((difference @ square) * difference).sum(axis=1)

    least = loss(levels, scales)
    for j in range(num_inputs):
        for step in (-1, 1):
            moved = levels.copy()
            moved[:, j] = np.clip(moved[:, j] + step, 0, 15)
            assert (loss(moved, scales) > least * (1 - 1e-4)).all()
    for block in range(num_inputs // fmt.block_size):
        for factor in (0.999, 1.001):
            moved = scales.copy()
            moved[:, block * fmt.block_size : (block + 1) * fmt.block_size] *= factor
            assert (loss(levels, moved) > least * (1 - 1e-4)).all()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 5), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_any_shape_and_any_moments_give_levels_in_range(fmt, num_rows, num_inputs, seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_rows, num_inputs)).astype(np.float32)
    inputs = rng.normal(size=(int(rng.integers(1, 20)), num_inputs)).astype(np.float32)
    inputs *= rng.random(num_inputs) < rng.random()  # dead inputs, maybe all of them
    quantized = gptq(rows, feedbacks(moments_of(inputs)), fmt)
    assert quantized.levels.shape == (num_rows, fmt.num_blocks(num_inputs), fmt.block_size)
    assert quantized.levels.max() < 1 << fmt.bits
    values = quantized.values(fmt, quantized.levels.shape[1] * fmt.block_size)
    assert np.isfinite(values).all()
    assert (values[:, num_inputs:] == 0).all()  # padding


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_matrix_rounded_in_pieces_is_the_same(fmt, monkeypatch):
    rows, inputs = problem(23, 70, 3)
    statistics = moments_of(inputs)
    whole = gptq(rows, feedbacks(statistics), fmt)
    monkeypatch.setattr("export.calibrate.gptq._CHUNK_BYTES", 4 * 70 * 5)
    pieces = gptq(rows, feedbacks(statistics), fmt)
    # A product of fewer rows may add up in another order, which flips a level now and then.
    assert (pieces.levels != whole.levels).mean() < 0.01
    np.testing.assert_allclose(pieces.scales, whole.scales, rtol=0.01)
    if not fmt.symmetric:
        np.testing.assert_array_equal(pieces.zero_points, whole.zero_points)


def test_feedback_stays_within_the_squares_of_a_wide_matrix():
    rows, inputs = problem(8, 256, seed=3)
    fmt = FORMATS[0]
    halves = [moments_of(inputs[:, :128]).squares[0], moments_of(inputs[:, 128:]).squares[0]]
    whole = gptq(rows, feedbacks(InputStatistics(halves)), fmt)
    for number, square in enumerate(halves):
        part = gptq(
            rows[:, 128 * number : 128 * (number + 1)], feedbacks(InputStatistics([square])), fmt
        )
        np.testing.assert_array_equal(whole.levels[:, 4 * number : 4 * (number + 1)], part.levels)


def test_moments_of_divided_inputs():
    _, inputs = problem(1, 96, seed=4)
    factors = np.exp(np.random.default_rng(5).normal(size=96)).astype(np.float32)
    (found,) = moments_of(inputs).divided_by(factors)
    (expected,) = moments_of(inputs / factors).squares
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
