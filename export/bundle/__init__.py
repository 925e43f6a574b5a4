"""The folder that is written: manifest, model card, ecosystem files, verification."""
