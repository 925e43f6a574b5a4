"""The ranges of the settings of sampling, which the sampler checks and help texts name."""

from __future__ import annotations

# From, to, and whether the lower limit is included.
RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 100, True),
    "top_p": (0, 1, False),
    "min_p": (0, 1, True),
    "repeat_penalty": (0.1, 10, True),
    "presence_penalty": (-2, 2, True),  # as OpenAI has them
    "frequency_penalty": (-2, 2, True),
}


def range_text(name: str) -> str:
    """The range of a setting in words."""
    least, most, inclusive = RANGES[name]
    return f"between {least} and {most}" if inclusive else f"above {least} and at most {most}"
