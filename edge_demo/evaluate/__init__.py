"""Measurements of a bundle: perplexity, divergence, tasks, speed."""
