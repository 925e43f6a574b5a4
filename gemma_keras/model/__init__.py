"""The Keras model: layers, backbone, and how weights come into it."""
