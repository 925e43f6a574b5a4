"""Rounding that looks at what a model computes: statistics, feedback, balance, sensitivity."""
