"""Counts instructions per token on emulated boards, ours beside llama.cpp's."""
