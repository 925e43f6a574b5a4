"""`docs/reference/commands.md`: every command and option, as the argparse parsers have them.

The page is built from the parsers' actions, not from `--help`: its layout differs between versions
of Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from edge_demo.cli import main as edge_demo
from export import cli as export_onnx
from tools.reference import HEADER

_INTRODUCTION = """# Commands

This page lists every option of `export-onnx` and `edge-demo`. The
[guides](../../README.md#guides) show them in use.

Every command takes `--json`: the last line on stdout is then one JSON object. Errors are one
sentence on stderr. After an unexpected error, `--debug` shows the traceback.

| exit status | meaning |
|---|---|
| 0 | success |
| 1 | failure, such as too little memory |
| 2 | bad request: an option, a file or a bundle cannot be used |
| 130 | interrupted by Ctrl-C |
"""


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each command's full name and its parser; `edge-demo` alone is one of them."""
    for parser in (export_onnx._parser(), edge_demo._parser()):
        yield parser.prog, parser
        for action in _actions(parser):
            if isinstance(action, argparse._SubParsersAction):
                yield from ((f"{parser.prog} {name}", sub) for name, sub in action.choices.items())


def page() -> str:
    """The whole page, in Markdown."""
    sections = [_section(name, parser) for name, parser in parsers()]
    return HEADER + "\n".join([_INTRODUCTION, *sections])


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    places = "".join(f" {_value(a)}" for a in _actions(parser) if not a.option_strings)
    lines = [f"## {name}", "", f"{parser.description}", ""]
    lines += ["```text", f"{name}{places} [options]", "```", ""]
    for group in parser._action_groups:
        rows = [_row(parser, action) for action in group._group_actions]
        rows = [row for row in rows if row]
        if not rows:
            continue
        if group.title not in ("positional arguments", "options"):
            note = f": {group.description}" if group.description else ""
            lines += [f"**{_capital(group.title)}**{note}.", ""]
        kind = "argument" if group.title == "positional arguments" else "option"
        lines += [f"| {kind} | meaning |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return parser._actions


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """One line of a table; empty for `--help` and for the list of commands."""
    if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
        return ""
    value = "" if action.nargs == 0 else f" {_value(action)}"
    names = [f"`{name}{value}`" for name in action.option_strings] or [f"`{_value(action)}`"]
    text = (action.help or "") % (vars(action) | {"prog": parser.prog})
    return f"| {_cell(', '.join(names))} | {_cell(text)} |"


def _value(action: argparse.Action) -> str:
    if action.choices and not action.metavar:
        return "COMMAND" if isinstance(action.choices, dict) else "|".join(action.choices)
    name = action.metavar or action.dest.upper()
    return f"[{name} …]" if action.nargs == "*" else str(name)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _capital(text: str | None) -> str:
    return f"{text[:1].upper()}{text[1:]}" if text else ""
