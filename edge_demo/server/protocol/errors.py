"""Refusals in the form of OpenAI's API.

Its client retries 408, 409, 429 and all from 500 on; so whatever would be refused again is 400 to
404, 413 or 415.
"""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """A request that gets an error for an answer.

    Args:
        message: one sentence for people.
        status: of HTTP.
        code: for programs, as OpenAI has it where there is one.
        param: the field that is wrong.
    """

    def __init__(
        self, message: str, status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    @classmethod
    def of_model(cls, asked: str, there: str) -> Refusal:
        """Returns the refusal of a model that is not here.

        Args:
            asked: its name.
            there: the name of the one that is.
        """
        message = f"there is no model {asked[:80]!r} here; there is {there!r}"
        return cls(message, 404, "model_not_found", "model")

    @property
    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
