"""The Keras model: layers, backbone, and loading of weights."""
