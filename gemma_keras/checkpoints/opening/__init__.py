"""What kind of source it is, and who opens it."""
