"""Recognizes chat templates, which are Jinja programs, as an equivalent `TurnTemplate`.

A template is recognized by its output for probe conversations. The output shows its tokens, role
names and the place of the system text. A `TurnTemplate` must then render the probes to the same
text. So the Jinja code does not matter; the turns must be Gemma's or ChatML's.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_keras.checkpoints.json_files import read_json
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.text.chat import GEMMA_TURNS, TURN_TEMPLATES, TurnTemplate
from gemma_keras.text.stream import processor

_MOST_BYTES = 256 << 10
_MOST_SECONDS = 30.0  # by the clock; the worker has fewer of the processor's
_WORKER = Path(__file__).with_name("template_worker.py")

_BOS = "<bos>"
_USER = {"role": "user", "content": "alpha one"}
_MODEL = {"role": "assistant", "content": "beta two"}
_AGAIN = {"role": "user", "content": "gamma three"}
_SYSTEM = {"role": "system", "content": "delta four"}
_SPACED = {"role": "user", "content": "  epsilon five \n"}
_TALK = (_USER, _MODEL, _AGAIN)
_PROBES = (_TALK, (_SYSTEM, *_TALK), (_SPACED,))
_ROLE = r"[A-Za-z_]{1,32}"


def read_folder_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The chat template of a Hugging Face folder, where transformers looks for it first.

    Raises:
        CheckpointError: a file is damaged.
    """
    for name in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        path = folder / name
        if path.is_file():
            with path.open("rb") as file:
                return file.read(_MOST_BYTES + 1).decode("utf-8", "replace")
    found = _template_in(tokenizer_config.get("chat_template"))
    path = folder / "chat_template.json"
    if found is None and path.is_file():
        found = _template_in(read_json(path).get("chat_template"))
    return found


def _template_in(entry: Any) -> str | None:
    """Returns a template as text, or the default one of a list of named templates."""
    if isinstance(entry, list):
        pairs = [e for e in entry if isinstance(e, Mapping)]
        named = {str(e.get("name")): e.get("template") for e in pairs}
        entry = named.get("default", next(iter(named.values()), None))
    if isinstance(entry, Mapping):
        entry = entry.get("default")
    return entry if isinstance(entry, str) and entry else None


def turns_of(
    template: str | None, tokenizer_model: bytes | None
) -> tuple[TurnTemplate, bool, tuple[str, ...]]:
    """Returns the turns that a model follows, whether its template says so, and remarks.

    Without a supported template, the turns are those that the tokenizer has tokens for. A remark
    then says that the template was not supported.

    Args:
        template: the Jinja text.
        tokenizer_model: the SentencePiece model, serialized.
    """
    likely = next((t for t in TURN_TEMPLATES if _has_tokens(t, tokenizer_model)), GEMMA_TURNS)
    if template is None:
        return likely, False, ()
    found = recognized(template)
    if isinstance(found, TurnTemplate):
        if tokenizer_model is None or _has_tokens(found, tokenizer_model):
            return found, True, ()
        found = f"the tokenizer lacks the tokens {found.start_of_turn} and {found.end_of_turn}"
    remark = (
        f"the model's chat template is not supported: {found}. The model is therefore "
        "treated as a base model. To treat it as instruction-tuned, set "
        "instruction_tuned=True (export-onnx: --instruction-tuned); its turns are then "
        f"{likely.start_of_turn} … {likely.end_of_turn}"
    )
    return likely, False, (remark,)


def _has_tokens(turns: TurnTemplate, tokenizer_model: bytes | None) -> bool:
    if tokenizer_model is None:
        return False
    model = processor(tokenizer_model)
    ids = {model.piece_to_id(piece) for piece in (turns.start_of_turn, turns.end_of_turn)}
    return len(ids) == 2 and model.unk_id() not in ids


@functools.lru_cache(maxsize=32)
def recognized(template: str) -> TurnTemplate | str:
    """Returns the turns that a template renders, or the end of a sentence that says why it is not
    supported."""
    for turns in TURN_TEMPLATES:
        if template == jinja_template(turns):  # what is written here need not be run
            return turns
    if len(template) > _MOST_BYTES:
        return f"it is longer than {_MOST_BYTES:,} characters"
    texts = _render(template)
    if isinstance(texts, str):
        return texts
    for turns in TURN_TEMPLATES:
        found = _turns_in(texts, turns.start_of_turn, turns.end_of_turn)
        if found is not None:
            return found
    return "it renders neither Gemma's turns nor ChatML"


def _turns_in(texts: Sequence[str | None], start: str, end: str) -> TurnTemplate | None:
    """The turns with these tokens by which the probes were rendered."""
    talk, with_system, spaced = texts
    s, e = re.escape(start), re.escape(end)
    match = re.fullmatch(
        rf"(?P<bos>{_BOS})?(?:{s}{_ROLE}\n(?P<default>.*?){e}\n)?"
        rf"{s}(?P<user>{_ROLE})\n(?:(?P<head>.*?)\n\n)?alpha one{e}\n"
        rf"{s}(?P<model>{_ROLE})\nbeta two{e}\n"
        rf"{s}(?P=user)\ngamma three{e}\n?(?P<prompt>{s}(?P=model)\n)?",
        talk or "",
        re.DOTALL,
    )
    if match is None:
        return None
    role = re.search(rf"{s}({_ROLE})\ndelta four\s*{e}", with_system or "")
    turns = TurnTemplate(
        start,
        end,
        match["user"],
        match["model"],
        role and role[1],
        match["default"] or match["head"] or "",
        f"\nepsilon five{end}" in (spaced or ""),
    )
    beginning = match["bos"] or ""
    for probe, text in zip(_PROBES, texts, strict=True):
        # A template may reject a system text, or ignore it.
        silent = probe[0]["role"] == "system" and (text is None or text == talk)
        if not silent and not _same(turns.text(probe, beginning), text, turns):
            return None
    return turns


def _same(ours: str, text: str | None, turns: TurnTemplate) -> bool:
    """Whether a text equals ours, possibly without the beginning of the model's turn."""
    prompt = f"{turns.start_of_turn}{turns.model}\n"
    return text is not None and text.removesuffix("\n") in (
        ours.removesuffix("\n"),
        ours.removesuffix(prompt).removesuffix("\n"),
    )


def _render(template: str) -> list[str | None] | str:
    """Returns the rendered probes, or why they could not be rendered."""
    request = {
        "path": sys.path,
        "template": template,
        "conversations": _PROBES,
        "names": {"bos_token": _BOS, "eos_token": "<eos>"},
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_WORKER)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=_MOST_SECONDS,
        )
        texts = json.loads(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, OSError, ValueError):
        texts = None
    else:
        if texts is None and b"No module named 'jinja2'" in done.stderr:
            return "jinja2, which renders it, is not installed (pip install jinja2)"
    if not isinstance(texts, list) or len(texts) != len(_PROBES):
        return "it is not a valid Jinja template, or it needs too much time or memory to render"
    return texts


def jinja_template(turns: TurnTemplate) -> str:
    """A Jinja template that renders these turns, for files of other runtimes."""
    content = "message['content'] | trim" if turns.strip else "message['content']"
    start, end = turns.start_of_turn, turns.end_of_turn
    if turns.system is None:
        system = (
            f"{{% set ns = namespace(before={_literal(_before(turns))}) %}}",
            f"{{% set ns.before = {content} + '\\n\\n' %}}",
            "ns.before + ",
            "{% set ns.before = '' %}",
        )
    else:
        opening = _literal(f"{start}{turns.system}\n")
        closing = _literal(f"{end}\n")
        default = ""
        if turns.default_system:
            text = _literal(f"{start}{turns.system}\n{turns.default_system}{end}\n")
            default = "{% if messages[0]['role'] != 'system' %}{{ " + text + " }}{% endif %}"
        system = (default, f"{{{{ {opening} + {content} + {closing} }}}}", "", "")
    return (
        "{{ bos_token }}" + system[0] + "{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        + system[1]
        + "{% else %}"
        + f"{{{{ {_literal(start)} + ({_literal(turns.model)} if message['role'] == 'assistant' "
        + f"else {_literal(turns.user)}) + '\\n' }}}}"
        + f"{{{{ {system[2]}{content} + {_literal(end + chr(10))} }}}}"
        + system[3]
        + "{% endif %}"
        "{% endfor %}"
        + "{% if add_generation_prompt %}{{ "
        + _literal(f"{start}{turns.model}\n")
        + " }}{% endif %}"
    )


def _before(turns: TurnTemplate) -> str:
    return f"{turns.default_system}\n\n" if turns.default_system else ""


def _literal(text: str) -> str:
    """A text as Jinja writes it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def chat_template(checkpoint: Checkpoint) -> str | None:
    """Returns the template for other runtimes: the model's own, unless `instruction_tuned`
    contradicts it. Then it is the template of its turns, or none."""
    own, tuned = checkpoint.chat_template, checkpoint.instruction_tuned
    if own is not None and (recognized(own) == checkpoint.turns) == tuned:
        return own
    return jinja_template(checkpoint.turns) if tuned else None
