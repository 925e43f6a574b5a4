"""LoRA adapters of every format, merged into their bases."""
