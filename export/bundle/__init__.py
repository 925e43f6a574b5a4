"""Writes the bundle's folder: manifest, model card, files for other runtimes, verification."""
