"""Requests and answers of the protocol as pure data: no engine, no network."""
