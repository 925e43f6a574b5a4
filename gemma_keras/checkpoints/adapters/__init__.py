"""Reads LoRA adapters of all formats and merges them into their base models."""
