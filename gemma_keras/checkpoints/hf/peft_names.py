"""Parses tensor names that PEFT writes, of an adapter and of the base model that it wraps."""

from __future__ import annotations

import re
from typing import Literal

Part = Literal["A", "B", "table A", "table B", "whole"]

_WRAPPER = "base_model.model."
_WRAPPED = (".base_layer.weight", ".original_module.weight")
# What follows a module's name: the parts of its update, each with the adapter's name in a file that
# a whole `PeftModel` was saved to.
_PART = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"lora_(?P<half>[AB])(?:\.(?P<adapter>\w+))?\.weight"
    r"|lora_embedding_(?P<table_half>[AB])(?:\.(?P<table_adapter>\w+))?"
    r"|modules_to_save(?:\.(?P<saved_adapter>\w+))?\.weight"
    r"|(?P<other>lora_\w+|token_adapter)(?:\.\w+)*"
    r")"
)


def is_adapters_tensor(name: str) -> bool:
    """Whether a tensor of a saved `PeftModel` is the adapter's."""
    return _PART.fullmatch(name) is not None


def bases_name(name: str) -> str:
    """The name that a tensor of a saved `PeftModel` has in its base."""
    name = name.removeprefix(_WRAPPER)
    wrapped = next((end for end in _WRAPPED if name.endswith(end)), None)
    return name if wrapped is None else name.removesuffix(wrapped) + ".weight"


def parse(name: str) -> tuple[str, Part, str | None] | None:
    """Splits an adapter's tensor name into the module, the part of its update, and the adapter's
    name if present; `None` for a tensor that no plain LoRA has."""
    name = name.removeprefix(_WRAPPER)
    match = _PART.fullmatch(name)
    if match is None:
        whole = bases_name(name)
        return (whole.removesuffix(".weight"), "whole", None) if whole.endswith(".weight") else None
    if match["other"]:
        return None
    if match["half"]:
        return match["module"], "A" if match["half"] == "A" else "B", match["adapter"]
    if match["table_half"]:
        part: Part = "table A" if match["table_half"] == "A" else "table B"
        return match["module"], part, match["table_adapter"]
    return match["module"], "whole", match["saved_adapter"]
