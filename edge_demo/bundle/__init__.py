"""Reads the files of a bundle and checks them before anything runs."""
