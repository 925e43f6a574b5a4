"""How weights are stored: formats, packing, recipes."""
