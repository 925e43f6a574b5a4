"""One thread that owns the engine and answers several requests at once."""
