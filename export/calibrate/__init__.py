"""Calibrates quantization: input statistics, error feedback, balancing, sensitivity."""
