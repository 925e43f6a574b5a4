"""Predictions as Vertex AI's containers give them: `instances` in, `predictions` out.

Google Cloud, "Custom container requirements for prediction". An instance is the body of a chat or
of a completion; `parameters` hold the fields that all instances share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from edge_demo.server.protocol.answer import Form
from edge_demo.server.protocol.chat import ChatForm, read_chat
from edge_demo.server.protocol.completions import CompletionForm, read_completion
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.fields import Fields
from edge_demo.server.protocol.request import GenerateRequest

_MOST_INSTANCES = 16
_DEFAULT_PORT = 8080


@dataclasses.dataclass(frozen=True)
class Vertex:
    """What the environment of a container says.

    Attributes:
        port: to listen at.
        health_route: that tells whether it works.
        predict_route: that answers.
    """

    port: int
    health_route: str
    predict_route: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Vertex:
        """Read the variables that begin with `AIP_`; each has a default.

        Raises:
            Refusal: one is not valid.
        """
        port = environment.get("AIP_HTTP_PORT") or str(_DEFAULT_PORT)
        if not port.isascii() or not port.isdecimal() or not 0 < int(port[:9]) <= 65535:
            raise Refusal(f"AIP_HTTP_PORT is {port[:40]!r}, which is not a port")
        routes = []
        for name, default in (
            ("AIP_HEALTH_ROUTE", "/health"),
            ("AIP_PREDICT_ROUTE", "/predict"),
        ):
            route = environment.get(name) or default
            if not route.startswith("/") or not route.isascii() or set(route) & set("{}?# "):
                raise Refusal(f"{name} is {route[:80]!r}, which is not a path")
            routes.append(route)
        return cls(int(port), *routes)


def read_predict(value: Any, vocabulary_size: int) -> list[tuple[GenerateRequest, Form]]:
    """The requests that a prediction asks for, and how each is shown.

    Args:
        value: the request's JSON.
        vocabulary_size: of the model.

    Raises:
        Refusal: an instance is wrong, or would be streamed.
    """
    fields = Fields(value)
    instances = fields.items("instances", _MOST_INSTANCES)
    if not instances:
        raise fields.wrong("instances", "a list of at least one instance")
    parameters = fields.any("parameters") or {}
    Fields(parameters, "parameters")
    found: list[tuple[GenerateRequest, Form]] = []
    for number, instance in enumerate(instances):
        Fields(instance, f"instances[{number}]")
        merged = {**parameters, **instance}
        if ("messages" in merged) == ("prompt" in merged):
            raise Refusal(
                f"instances[{number}] must have either messages or a prompt", param="instances"
            )
        if "messages" in merged:
            wanted, form = read_chat(merged, vocabulary_size), ChatForm()
        else:
            wanted, form = read_completion(merged, vocabulary_size), CompletionForm()
        if wanted.stream:
            raise Refusal("a prediction is not streamed; leave stream out", param="stream")
        found.append((wanted, form))
    return found
