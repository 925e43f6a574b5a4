"""Measures a bundle: perplexity, KL divergence, task accuracy, speed."""
