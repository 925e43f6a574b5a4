"""Asks a server that runs on some processor: a chat, a stream, JSON by a schema, a tool's call."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.arm64.user_space import ROOT

_START_S = 600  # under an emulator
_SCHEMA = {
    "type": "object",
    "properties": {"word": {"enum": ["yes", "no", "perhaps"]}, "sure": {"type": "boolean"}},
    "required": ["word", "sure"],
    "additionalProperties": False,
}
_TOOL = {"name": "answer", "description": "Answers.", "parameters": _SCHEMA}
_ASKED: dict[str, dict[str, Any]] = {
    "a chat": {},
    "a stream": {"stream": True},
    "a schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": _SCHEMA}}},
    "a tool's call": {
        "tools": [{"type": "function", "function": _TOOL}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    },
}


class ServerError(Exception):
    """A server did not start or did not answer."""


def answers(python: Path, environment: Mapping[str, str], bundle: Path) -> dict[str, Any]:
    """What a server says, greedily, by what it was asked for.

    Args:
        python: that runs it.
        environment: beside this process's own.
        bundle: a small one that is tuned to answer.

    Raises:
        ServerError: there is no answer.
    """
    command = [python, "-m", "edge_demo", "serve", bundle, "--port", "0", "--json", "--force"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise ServerError(process.stderr.read().strip() or "it ended without a word")
            url = json.loads(line)["url"]
            return {name: _ask(url, more) for name, more in _ASKED.items()}
        except urllib.error.HTTPError as error:
            raise ServerError(error.read().decode(errors="replace")) from error
        except OSError as error:
            raise ServerError(f"it did not answer: {error}") from error
        finally:
            process.terminate()


def _ask(url: str, more: dict[str, Any]) -> Any:
    """What is the same wherever it is said: the messages, or the pieces of one."""
    messages = [{"role": "user", "content": "The boat went down the river"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 60, **more}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=_START_S) as response:
        text = response.read().decode()
    if "stream" in more:
        parts = [line.removeprefix("data: ") for line in text.splitlines() if line]
        chunks = [json.loads(part) for part in parts if part.startswith("{")]
        return [c["choices"][0]["delta"].get("content") for c in chunks if c["choices"]], parts[-1]
    message = json.loads(text)["choices"][0]["message"]
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return message["content"], calls
