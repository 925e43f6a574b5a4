"""ONNX graphs: two lowerings, what they promise, and the weights file below them."""
