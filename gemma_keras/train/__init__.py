"""Teaching a Gemma: rows that people have, and what is learnt from them."""
