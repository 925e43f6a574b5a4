"""Checks that messages, help texts and docstrings are plain English: short sentences, common words.

The sources are read, not run: a message is any text in the code that has words with spaces between.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for package in ("edge_demo", "gemma_keras", "export")
    for path in (ROOT / package).rglob("*.py")
)
LONGEST = 25  # words in a sentence

# Each is followed by what says it plainly.
FORBIDDEN = {
    r"\b(?:is|are|was|be) told\b": "a warning says, is named, is called with",
    r"\btells? of\b": "describes, reports",
    r"\bto be had\b|\bcan be had\b": "is available",
    r"\bhas not the\b|\bhas none of the\b|\bwhich \w+ has not\b": "lacks",
    r"\bis none\b": "is not valid",
    r"(?<!there )\bis no (?!longer\b)\w": "is not a",
    r"\bthere (?:is|are) not\b": "is not supported",
    r"\bwhole or not at all\b": "only when it is complete",
    r"\bcut short\b": "truncated",
    r"\bnobody\b|\bwhoever\b|\bsomebody\b|\banybody\b": "nothing, the user, untrusted",
    r"\banew\b": "again, recreated",
    r"\bgoes with\b|\bgo with\b": "needs, is only valid with",
    r"\bnot those? of\b": "does not match",
    r"\bas (?:it is|they are)(?=[,.;:]|$)": "unchanged",
    r"\bthose there are\b|\bwhat there is\b": "the available ones",
    r"\bof the kind\b|\bnothing of the\b": "no such",
    r"\b(?:looks|look) both ways\b": "bidirectional attention",
    r"\bhas no place for\b|\bhave no place for\b": "does not have",
    r"\bis known here\b|\bknown here\b|\bunknown here\b|\bread here\b": "supported",
    r"\bgiven out\b|\bgive out\b|\bgiving out\b": "yielded, returned",
    r"\bput in by\b|\bput together\b": "added by, combined",
    r"\bbeside it\b|\bbeside them\b": "in the same folder, next to it",
    r"\bpassed over\b": "ignored",
    r"\bin place of\b": "instead of",
    r"\bnevertheless\b": "anyway",
    r"\bfor ever\b": "without end",
    r"\bwhat .{1,60} costs\b": "the loss that ... causes",
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each message or help text; a value in braces counts as one word."""
    tree = ast.parse(path.read_text())
    documented = {id(node) for node in _docstrings(tree)}
    for node in _strings(tree):
        text = _text(node)
        if id(node) not in documented and len(text.split()) > 3 and not _is_code(text):
            yield node.lineno, text


def _strings(node: ast.AST) -> Iterator[ast.Constant | ast.JoinedStr]:
    if isinstance(node, ast.JoinedStr | ast.Constant):
        if isinstance(node, ast.JoinedStr) or isinstance(node.value, str):
            yield node
    else:
        for child in ast.iter_child_nodes(node):
            yield from _strings(child)


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)


def _docstrings(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        match node:
            case (
                ast.Module(body=[ast.Expr(value), *_])
                | ast.ClassDef(body=[ast.Expr(value), *_])
                | ast.FunctionDef(body=[ast.Expr(value), *_])
                | ast.AsyncFunctionDef(body=[ast.Expr(value), *_])
            ):
                yield value


def _is_code(text: str) -> bool:
    """Lists of keys, templates, programs and pages of text, which are no sentences."""
    return "\n" in text or text.startswith("<") or "{%" in text or "{{" in text


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?;])\s+|\n\n", text)


def long_sentences(text: str) -> list[str]:
    return [sentence for sentence in sentences(text) if len(sentence.split()) > LONGEST]


def quaint(text: str) -> list[str]:
    """What of the text is forbidden, with what to write instead."""
    return [
        f"{match[0]!r} (plainly: {plainly})"
        for pattern, plainly in FORBIDDEN.items()
        if (match := re.search(pattern, text, re.IGNORECASE))
    ]


def _complaints(found: Iterator[tuple[int, str]], path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {complaint}"
        for line, text in found
        for complaint in [
            *(f"a sentence of more than {LONGEST} words: {s}" for s in long_sentences(text)),
            *(f"{q} in: {text}" for q in quaint(text)),
        ]
    ]


# Others' words, which a model was tuned with: a shorter sentence would be another question.
QUOTING = {"edge_demo/guard/template.py"}


def test_messages_and_help_texts_are_short_and_plain():
    own = [path for path in SOURCES if path.relative_to(ROOT).as_posix() not in QUOTING]
    complaints = [line for path in own for line in _complaints(texts(path), path)]
    assert not complaints, "\n".join(complaints)


def test_module_docstrings_are_plain():
    complaints = []
    for path in SOURCES:
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text, f"{path.relative_to(ROOT)} has no docstring that says what it does"
        complaints += _complaints(iter([(1, text)]), path)
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    "text", ["its header is none", "a damaged file is told and made anew", "word " * 26]
)
def test_what_is_not_plain_is_found(text):
    assert quaint(text) or long_sentences(text)
