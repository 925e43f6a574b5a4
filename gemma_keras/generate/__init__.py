"""Generates text with Keras: the loop, compiled functions, and checks for finite logits."""
