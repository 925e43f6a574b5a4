"""The terms of use of a bundle's weights, for its notice and model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from export.bundle.base_model import base_model
from gemma_keras.config import GemmaConfig
from gemma_keras.sizes import releases


@dataclasses.dataclass(frozen=True)
class Terms:
    """Terms of use.

    Attributes:
        subject: the name of the model in the terms.
        title: theirs.
        url: where they are.
        policy: the title of the policy that belongs to them.
        policy_url: where that is.
        front_matter: how a model card on the Hugging Face Hub names them.
    """

    subject: str
    title: str
    url: str
    policy: str
    policy_url: str
    front_matter: tuple[str, ...]


_GEMMA = Terms(
    "Gemma",
    "Gemma Terms of Use",
    "ai.google.dev/gemma/terms",
    "Gemma Prohibited Use Policy",
    "ai.google.dev/gemma/prohibited_use_policy",
    ("license: gemma",),
)
_HEALTH = Terms(
    "HAI-DEF",
    "Health AI Developer Foundations Terms of Use",
    "developers.google.com/health-ai-developer-foundations/terms",
    "HAI-DEF Prohibited Use Policy",
    "developers.google.com/health-ai-developer-foundations/prohibited-use-policy",
    (
        "license: other",
        "license_name: health-ai-developer-foundations",
        "license_link: https://developers.google.com/health-ai-developer-foundations/terms",
    ),
)
_BY_LICENCE = {"gemma": _GEMMA, "health-ai-developer-foundations": _HEALTH}


def terms_of(provenance: Mapping[str, Any], config: GemmaConfig, tuned: bool) -> Terms:
    """Returns the terms of a checkpoint: those of the published model that it is, or was made from.

    Arguments as for `export.bundle.base_model.base_model`.
    """
    base = base_model(provenance, config, tuned)
    for size, release in releases():
        if base is not None and release.repository == base.repository:
            return _BY_LICENCE[size.licence]
    return _BY_LICENCE.get(str(provenance.get("license")), _GEMMA)
