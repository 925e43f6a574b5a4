"""Builds ONNX graphs: two lowerings, their contract, and the weights file."""
