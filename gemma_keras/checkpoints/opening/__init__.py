"""Classifies a source and opens it."""
