"""Generates text: tokenizer, chat turns, sampling, completions."""
