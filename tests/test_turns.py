"""Notebook and device render a conversation to the same ids."""

from __future__ import annotations

import dataclasses

import pytest

from edge_demo.turns import stretches
from gemma_keras.text.chat import CHATML_TURNS, GEMMA_TURNS

TALK = [("user", " Is it\nopen? "), ("model", "Yes.\n"), ("user", "Until when?")]
ROLES = {"user": "user", "model": "assistant"}
TEMPLATES = {
    "gemma": GEMMA_TURNS,
    "chatml": CHATML_TURNS,
    "stripped chatml": dataclasses.replace(CHATML_TURNS, strip=True),
    "with a system text": dataclasses.replace(GEMMA_TURNS, default_system="Be kind."),
}


@pytest.mark.parametrize("system", ["", " Be brief.\n", "\n"])
@pytest.mark.parametrize("turns", TEMPLATES.values(), ids=TEMPLATES)
def test_messages_and_turns_are_rendered_alike(turns, system):
    messages = [{"role": ROLES[who], "content": text} for who, text in TALK]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    found = [text for _, text in turns.stretches(messages)]
    assert found == stretches(turns, TALK, system)


def test_white_space_is_left_out_where_a_template_does_so():
    kept, left_out = (
        stretches(t, TALK, " S ") for t in (CHATML_TURNS, TEMPLATES["stripped chatml"])
    )
    assert kept[:2] == ["system\n S ", "user\n Is it\nopen? "]
    assert left_out[:2] == ["system\nS", "user\nIs it\nopen?"]
    assert stretches(GEMMA_TURNS, TALK, " S ")[0] == "user\nS\n\nIs it\nopen?"
