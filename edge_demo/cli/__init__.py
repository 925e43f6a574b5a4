"""The command line `edge-demo`: one file per command, shared options, and terminal output."""
