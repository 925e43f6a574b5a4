"""To the type checker Keras is anything: as it types them, operations return None or a PyTree."""

from typing import Any

def __getattr__(name: str) -> Any: ...
