"""How weights are stored: formats, recipes, and numbers rounded to nearest."""
