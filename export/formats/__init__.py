"""Defines how weights are stored: formats, recipes, and rounding to nearest."""
