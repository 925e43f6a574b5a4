"""Text: turn templates, and tokens decoded as they come."""
