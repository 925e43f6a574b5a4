"""Runs a bundle's graphs in onnxruntime: token ids to logits, key-value caches, memory."""
