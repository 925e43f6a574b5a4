"""The command `edge-demo`: a file for each command, its options and its terminal."""
