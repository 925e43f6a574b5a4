"""KerasHub to the type checker: anything."""

from typing import Any

def __getattr__(name: str) -> Any: ...
