"""`docs/reference/python-api.md`: signatures and docstrings of what users import.

The source is read with `ast`, so that no Keras backend has to start.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from tools.reference import HEADER, ROOT

# What stands on the page: a heading, and for each module its public names.
PAGES: tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], ...] = (
    (
        "gemma_keras",
        (
            ("gemma_keras.causal_lm", ("GemmaCausalLM",)),
            ("gemma_keras.text_embedder", ("GemmaTextEmbedder",)),
            ("gemma_keras.train.distil", ("Distiller",)),
            ("gemma_keras.train.teacher_targets", ("write_targets",)),
            ("gemma_keras.train.preferences", ("PreferenceTuner",)),
            ("gemma_keras.model.backbone", ("GemmaBackbone",)),
            ("gemma_keras.tokenizer", ("GemmaTokenizer", "GemmaCausalLMPreprocessor")),
            ("gemma_keras.open", ("open_checkpoint",)),
            ("gemma_keras.config", ("GemmaConfig", "LayerSpec")),
            ("gemma_keras.checkpoints.hf.config", ("named_config",)),
        ),
    ),
    (
        "export",
        (
            ("export.pipeline", ("export_onnx", "ExportResult")),
            ("export.options", ("ExportOptions",)),
        ),
    ),
    (
        "edge_demo",
        (
            ("edge_demo.bundle.reader", ("Bundle",)),
            ("edge_demo.engine.runner", ("Engine",)),
            ("edge_demo.text.generator", ("Generator",)),
            ("edge_demo.text.sampling", ("Sampler",)),
        ),
    ),
    (
        "Names of modules",
        (
            ("edge_demo.text.tokenizer", ("Tokenizer",)),
            ("edge_demo.text.generator", ("CompletionStream", "engine_for")),
            ("edge_demo.text.answer", ("Completion", "TextPiece")),
            ("edge_demo.text.session", ("ChatSession",)),
            ("export.calibration_source", ("calibration_source",)),
            ("gemma_keras.checkpoints.hf.config", ("config_from_hf", "config_to_hf")),
            ("gemma_keras.checkpoints.gguf.config", ("config_from_gguf", "config_to_gguf")),
            ("gemma_keras.checkpoints.hf.writer", ("write_safetensors_folder",)),
            ("gemma_keras.checkpoints.gguf.writer", ("write_gguf",)),
            ("gemma_keras.model.distribute", ("distribution", "layout_map", "bytes_by_device")),
        ),
    ),
)
_INTRODUCTION = """# Python API

This page lists the names that users import, with their signatures and docstrings. Import the names
under a package's heading from that package: `from gemma_keras import GemmaCausalLM`. Import the
other names from the module that their heading names. The models are KerasHub classes: methods
that this page does not list work as in KerasHub.
"""
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Warns|Yields):$")
_ITEM = re.compile(r"(\*{0,2}[\w., ]+?): (.*)")
_WIDTH = 96


def page() -> str:
    """The whole page, in Markdown."""
    lines = [_INTRODUCTION]
    for title, modules in PAGES:
        lines.append(f"## {title}\n")
        for module, names in modules:
            lines += [_entry(title, module, name) for name in names]
    return HEADER + "\n".join(lines)


def _entry(title: str, module: str, name: str) -> str:
    package = title.isidentifier()
    heading = f"### {name}\n" if package else f"### {module}.{name}\n"
    node = _definitions(module)[name]
    lines = [heading, _signature(name, node), _docstring(node)]
    if isinstance(node, ast.ClassDef):
        lines += [
            f"#### {name}.{method.name}\n\n{_signature(method.name, method)}\n{_docstring(method)}"
            for method in _methods(module, node)
        ]
    return "\n".join(lines)


def _definitions(module: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    body = _tree(module).body
    return {n.name: n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef)}


def _tree(module: str) -> ast.Module:
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(Path(path).read_text())


def _methods(module: str, node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Public methods with a docstring, then those of base classes that are this project's."""
    for method in node.body:
        public = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
        if public and ast.get_docstring(method) and not _is_setter(method):
            yield method
    homes = {
        alias.name: line.module
        for line in _tree(module).body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    } | dict.fromkeys(_definitions(module), module)
    for base in node.bases:
        home = homes.get(base.id) if isinstance(base, ast.Name) else None
        if home is None or home.split(".")[0] not in ("gemma_keras", "edge_demo"):
            continue
        inherited = _definitions(home)[base.id]
        if isinstance(inherited, ast.ClassDef):
            yield from _methods(home, inherited)


def _is_setter(method: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in method.decorator_list)


def _signature(name: str, node: ast.ClassDef | ast.FunctionDef) -> str:
    """As Python, one argument a line where it is long; fields for a dataclass."""
    decorators = [ast.unparse(d) for d in node.decorator_list]
    if any(d in ("property", "functools.cached_property") for d in decorators):
        return f"```python\n{name}  # property\n```\n"
    returns = ""
    if isinstance(node, ast.ClassDef):
        made_by = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if made_by:
            arguments = _arguments(made_by[0].args)
        else:
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            arguments = [ast.unparse(field) for field in fields]
    else:
        arguments = _arguments(node.args)
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) > _WIDTH:
        inner = "".join(f"    {argument},\n" for argument in arguments)
        line = f"{name}(\n{inner}){returns}"
    return f"```python\n{line}\n```\n"


def _arguments(arguments: ast.arguments) -> list[str]:
    """Each argument with its annotation and default, without `self` and `cls`."""
    place = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(place) - len(arguments.defaults)) + arguments.defaults
    written = [_argument(a, d) for a, d in zip(place, defaults, strict=True)]
    written = [a for a in written if a not in ("self", "cls")]
    if arguments.vararg:
        written.append(f"*{_argument(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        written.append("*")
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    written += [_argument(a, d) for a, d in pairs]
    if arguments.kwarg:
        written.append(f"**{_argument(arguments.kwarg, None)}")
    return written


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    note = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    if default is None:
        return f"{argument.arg}{note}"
    equals = " = " if note else "="
    return f"{argument.arg}{note}{equals}{ast.unparse(default)}"


def _docstring(node: ast.ClassDef | ast.FunctionDef) -> str:
    """A docstring as Markdown: its sections become lists."""
    lines: list[str] = []
    in_section = False
    for line in (ast.get_docstring(node) or "").splitlines():
        if _SECTION.match(line):
            in_section = True
            lines += [f"**{line}**", ""]
        elif in_section and line.startswith("    ") and not line.startswith("     "):
            item = _ITEM.fullmatch(line.strip())
            lines.append(f"* `{item[1]}`: {item[2]}" if item else line.strip())
        elif in_section and line.startswith("     "):
            lines[-1] += f" {line.strip()}"
        else:
            in_section = in_section and not line
            lines.append(line)
    return inspect.cleandoc("\n".join(lines)) + "\n"
