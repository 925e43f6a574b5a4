"""Converts from and to KerasHub's models."""
