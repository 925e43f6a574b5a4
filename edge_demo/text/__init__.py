"""From prompts to answers: tokenizer, turns, sampling, completion."""
