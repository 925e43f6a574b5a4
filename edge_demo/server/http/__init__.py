"""Routes, access and streams, with Starlette."""
