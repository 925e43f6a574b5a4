"""One bundle's graphs in onnxruntime: tokens to logits, caches, memory."""
