"""Functions that a model may call: how it learns of them, and how its calls are read."""
