"""The files of a bundle: what they must hold, checked before anything runs."""
