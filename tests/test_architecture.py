"""Who may import whom, what that costs at start, and what goes into the wheel.

The rules are data; the code is read with `ast`, or started in a fresh process.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.gguf_files import metadata, tensors, write_gguf
from tools.arm64.user_space import TEST_PACKAGES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("gemma_keras", "export", "edge_demo")
TESTS_OF_THE_DEVICE = sorted((ROOT / "tests" / "edge_demo").glob("*.py"))

# What a package may import of the others: a package, or one module of it.
MAY_IMPORT = {
    # what notebook and device do alike, on floor 1 of the light package; how much memory there is
    "gemma_keras": (
        "edge_demo.detokenizer",
        "edge_demo.device.memory_limits",
        "edge_demo.durable",
        "edge_demo.safetensors_header",
        "edge_demo.turns",
    ),
    "edge_demo": ("serve", "grammar"),
    # the schema of a bundle; what both commands do alike; how much memory there is
    "export": (
        "gemma_keras",
        "edge_demo.argument_parser",
        "edge_demo.bundle.manifest",
        "edge_demo.telemetry",
        "edge_demo.unexpected",
        "edge_demo.device.memory_limits",
        "edge_demo.durable",
    ),
}
# What one place may import beyond that.
EXCEPTIONS = {
    # runs the bundle it has written, as the device will
    "export.bundle.verify": (
        "edge_demo.bundle.reader",
        "edge_demo.engine.runner",
        "edge_demo.text.tokenizer",
        "edge_demo.errors",
        "edge_demo.evaluate.perplexity",
    ),
    "export.bundle.verify_embedder": (
        "edge_demo.bundle.reader",
        "edge_demo.engine.embedder",
        "edge_demo.text.embedding",
        "edge_demo.text.tokenizer",
        "edge_demo.errors",
    ),
    # measures it as `edge-demo compare` does
    "export.bundle.report": (
        "edge_demo.bundle.reader",
        "edge_demo.evaluate.compare",
        "edge_demo.engine.runner",
        "edge_demo.errors",
    ),
    # feeds the graph it samples from, as the device will
    "export.calibrate.self_sample": (
        "edge_demo.bundle.embedding",
        "edge_demo.engine.binding",
        "edge_demo.engine.sessions",
    ),
    # opens what it has written, as the device will
    "export.bundle.draft": ("edge_demo.bundle.reader",),
    "export.bundle.write_embedder": ("edge_demo.bundle.reader",),
    # the one definition of the divergence, of exports and on the device
    "export.calibrate.sensitivity": ("edge_demo.evaluate.perplexity",),
    # the method that Keras users know; imports only when it is called
    "gemma_keras.causal_lm:GemmaCausalLM.export": ("export",),
    "gemma_keras.text_embedder:GemmaTextEmbedder.export": ("export",),
    # a bundle as the teacher; imports only when one is given
    "gemma_keras.train.teacher_targets:_open_bundle": (
        "edge_demo.bundle.reader",
        "edge_demo.engine.runner",
    ),
    # teaches rows; imports only when it is called
    "gemma_keras.learning:LearnsTokens.fit": ("gemma_keras.train.fit",),
    "gemma_keras.learning:LearnsTokens.evaluate": ("gemma_keras.train.fit",),
    # a name from before there were wings; imports only when it is asked for
    "gemma_keras.checkpoints:__getattr__": ("gemma_keras.open",),
}
# The wings of a package, lowest floor first: a file imports its own wing and lower floors. A wing is
# a folder with all below it, or a file; what stands in two belongs to the longer name.
FLOORS = {
    "edge_demo": (
        (
            "edge_demo.errors",
            "edge_demo.units",
            "edge_demo.durable",
            "edge_demo.detokenizer",
            "edge_demo.safetensors_header",
            "edge_demo.turns",
            "edge_demo.telemetry",
            "edge_demo.unexpected",
        ),
        ("edge_demo.argument_parser", "edge_demo.device"),
        ("edge_demo.bundle",),
        ("edge_demo.engine",),
        ("edge_demo.text",),
        ("edge_demo.guard",),
        ("edge_demo.evaluate", "edge_demo.tool_calls"),
        ("edge_demo.server.protocol", "edge_demo.server.worker", "edge_demo.server.page"),
        ("edge_demo.server.http",),
        ("edge_demo.server",),
        ("edge_demo.cli",),
        ("edge_demo",),
    ),
    "gemma_keras": (
        ("gemma_keras.errors", "gemma_keras.sizes", "gemma_keras.text"),
        ("gemma_keras.missing", "gemma_keras.config"),
        ("gemma_keras.checkpoints",),
        ("gemma_keras.checkpoints.hf", "gemma_keras.checkpoints.gguf"),
        ("gemma_keras.checkpoints.adapters", "gemma_keras.model"),
        (
            "gemma_keras.checkpoints.opening",
            "gemma_keras.generate",
            "gemma_keras.keras_hub",
            "gemma_keras.learning",
            "gemma_keras.tokenizer",
        ),
        ("gemma_keras.adapting",),
        ("gemma_keras.causal_lm", "gemma_keras.text_embedder"),
        ("gemma_keras.train",),
        ("gemma_keras.open",),
        ("gemma_keras",),
    ),
    "export": (
        ("export.errors", "export.progress", "export.start_keras"),
        ("export.calibration_source",),
        ("export.formats",),
        ("export.options",),
        ("export.graph",),
        ("export.calibrate",),
        ("export.bundle",),
        ("export.choose_formats", "export.open_source"),
        ("export.embedder",),
        ("export.pipeline",),
        ("export.cli",),
        ("export",),
    ),
}
# Which dependencies each package stands on: of the distribution itself, and extras.
EXTRAS = {
    "edge_demo": ("chat", "serve", "grammar"),
    "gemma_keras": ("keras", "jax", "torch", "sample"),
    "export": ("export", "sample"),
}
# The wings of the device that stand on an extra.
OF_EXTRAS = {
    "edge_demo.cli.editor": "chat",
    "edge_demo.server.http": "serve",
    "edge_demo.text.grammar": "grammar",
}
# Distributions that bring a top-level module under another name; keras-nlp is a name of keras-hub.
BROUGHT_BY = {"keras_hub": "keras-nlp", "google": "protobuf", "ml_dtypes": "ml-dtypes"}
ON_THE_DEVICE = {"onnxruntime", "numpy", "sentencepiece"}
# What `edge_demo` uses where it is installed, and the one module that imports it, in a function.
OPTIONAL_ON_THE_DEVICE = {"prompt_toolkit": "edge_demo.cli.editor"}

KERAS = ("keras", "keras_hub", "tensorflow", "jax", "torch")
NOT_ON_THE_DEVICE = (*KERAS, "onnx", "onnx_ir", "gguf", "safetensors", "gemma_keras", "export")


# --- what is written -----------------------------------------------------------------------------


class Import(NamedTuple):
    """One imported module: by which module, inside which function, if any."""

    by: str
    function: str
    module: str


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


def imports_of(name: str, tree: ast.AST, is_package: bool) -> Iterator[Import]:
    """Every import below `tree`, those of functions and of `TYPE_CHECKING` blocks too."""

    def visit(node: ast.AST, scope: str, in_function: bool) -> Iterator[Import]:
        function = scope if in_function else ""
        if isinstance(node, ast.Import):
            yield from (Import(name, function, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            # `from package import module` imports a module that only the file system knows
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(name, function, inner if inner in MODULES else base)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function or isinstance(node, ast.ClassDef):
            scope = f"{scope}.{node.name}".lstrip(".")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, scope, in_function or is_function)

    return visit(tree, "", False)


MODULES = dict(modules())
IMPORTS = [
    found
    for name, path in MODULES.items()
    for found in imports_of(name, ast.parse(path.read_text()), path.name == "__init__.py")
]


def top(module: str) -> str:
    return module.split(".")[0]


def is_within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == a or module.startswith(f"{a}.") for a in allowed)


def test_the_imports_of_all_three_packages_were_read():
    assert {top(name) for name in MODULES} == set(PACKAGES)
    assert Import("export.graph.store_weights", "", "export.formats.formats") in IMPORTS
    assert Import("export.bundle.verify", "verify", "keras") in IMPORTS
    assert (
        Import("export.pipeline", "", "export.bundle.writer") in IMPORTS
    )  # from export import bundle


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("from .formats import Plan", "export.formats.formats"),
        ("from . import formats", "export.formats.formats"),
        ("from .. import bundle", "export.bundle"),
        ("def f():\n  import edge_demo.engine.runner as e", "edge_demo.engine.runner"),
        ("if TYPE_CHECKING:\n  from edge_demo.engine import runner", "edge_demo.engine.runner"),
    ],
)
def test_every_way_to_write_an_import_is_read(line, module):
    found = imports_of("export.formats.recipes", ast.parse(line), is_package=False)
    assert [i.module for i in found] == [module]


def test_packages_import_each_other_only_as_the_architecture_says():
    wrong = [
        found
        for found in IMPORTS
        if top(found.module) in PACKAGES
        and top(found.module) != top(found.by)
        and not is_within(found.module, MAY_IMPORT[top(found.by)])
        and not is_within(found.module, EXCEPTIONS.get(found.by, ()))
        and not is_within(found.module, EXCEPTIONS.get(f"{found.by}:{found.function}", ()))
    ]
    assert not wrong


WINGS = {wing: floor for floors in FLOORS.values() for floor, w in enumerate(floors) for wing in w}


def wing_of(module: str) -> str:
    return max((wing for wing in WINGS if is_within(module, (wing,))), key=len)


def test_every_wing_is_there():
    assert {wing_of(name) for name in MODULES if top(name) in FLOORS} == set(WINGS)


def test_a_file_imports_its_own_wing_and_lower_floors_only():
    upward = [
        found
        for found in IMPORTS
        if top(found.by) in FLOORS
        and top(found.by) == top(found.module)
        and wing_of(found.by) != wing_of(found.module)
        and WINGS[wing_of(found.by)] <= WINGS[wing_of(found.module)]
        and f"{found.by}:{found.function}" not in EXCEPTIONS
    ]
    assert not upward


def test_no_file_imports_itself_by_way_of_others():
    """Imports within functions and of `TYPE_CHECKING` blocks count too."""
    below: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in IMPORTS:
        asked = f"{found.by}:{found.function}" in EXCEPTIONS
        if found.module in MODULES and top(found.by) in FLOORS and not asked:
            below[found.by].add(found.module)
    while leaves := {name for name, modules in below.items() if not modules}:
        below = {n: modules - leaves for n, modules in below.items() if n not in leaves}
    assert not below


def test_export_reads_of_edge_demo_only_the_schema_but_for_verification():
    light = (
        "edge_demo.argument_parser",
        "edge_demo.telemetry",
        "edge_demo.unexpected",
        "edge_demo.device.memory_limits",
        "edge_demo.durable",
    )
    users = {
        i.by
        for i in IMPORTS
        if top(i.by) == "export" and top(i.module) == "edge_demo" and i.module not in light
    }
    of_schema = {
        i.by for i in IMPORTS if i.module == "edge_demo.bundle.manifest" and top(i.by) == "export"
    }
    assert users - of_schema <= {
        "export.bundle.verify",
        "export.bundle.verify_embedder",
        "export.bundle.report",
        "export.calibrate.sensitivity",
    }


# --- dependencies --------------------------------------------------------------------------------


def distribution_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower()


def declared(extra: str) -> set[str]:
    """Names of the distributions of an extra, those of the extras it includes too."""
    names = set()
    for requirement in PROJECT["project"]["optional-dependencies"][extra]:
        if included := re.match(r"gemma-keras\[(.*)\]", requirement):
            names |= {name for e in included[1].split(",") for name in declared(e)}
        else:
            names.add(distribution_name(requirement))
    return names


def third_party(package: str, *without: str) -> set[str]:
    return {
        top(i.module)
        for i in IMPORTS
        if is_within(i.by, (package,))
        and not is_within(i.by, without)
        and top(i.module) not in {*PACKAGES, *sys.stdlib_module_names}
    }


def test_the_device_needs_three_packages_and_edge_demo_imports_no_others():
    assert {distribution_name(r) for r in PROJECT["project"]["dependencies"]} == ON_THE_DEVICE
    assert third_party("edge_demo", *OF_EXTRAS) <= ON_THE_DEVICE


@pytest.mark.parametrize("wing", OF_EXTRAS)
def test_what_an_extra_brings_is_imported_in_one_wing(wing):
    brought = {name.replace("-", "_") for name in declared(OF_EXTRAS[wing])}
    assert third_party(wing) <= ON_THE_DEVICE | brought


def test_what_is_optional_on_the_device_is_imported_in_a_function_of_one_module():
    found = [
        i for i in IMPORTS if top(i.by) == "edge_demo" and top(i.module) in OPTIONAL_ON_THE_DEVICE
    ]
    assert {(top(i.module), i.by) for i in found} == set(OPTIONAL_ON_THE_DEVICE.items())
    assert all(i.function for i in found)


def test_the_tests_of_the_device_import_what_its_emulation_installs():
    imported, to_read = set(), {f"tests.edge_demo.{p.stem}" for p in TESTS_OF_THE_DEVICE}
    to_read, read = to_read | {"tests.conftest"}, set()
    while to_read - read:
        name = (to_read - read).pop()
        read.add(name)
        tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())
        # those within functions are of bundles made here, or of tests that skip themselves there
        found = {i.module for i in imports_of(name, tree, False) if not i.function}
        to_read |= {module for module in found if top(module) == "tests"}
        imported |= {top(module) for module in found}
    assert "tests.models" in read
    others = imported - {"tests", "edge_demo", *sys.stdlib_module_names}
    assert {"pytest", "numpy"} < others <= {*ON_THE_DEVICE, *TEST_PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_imports_is_among_its_declared_dependencies(package):
    allowed = ON_THE_DEVICE.union(*(declared(extra) for extra in EXTRAS[package]))
    brings = importlib.metadata.packages_distributions()
    for module in third_party(package):
        distributions = {BROUGHT_BY.get(module)} | {
            d.lower().replace("_", "-") for d in brings[module]
        }
        assert distributions & allowed, f"{package} imports {module}, declared nowhere"


def test_the_wheel_holds_the_three_packages_and_no_tests():
    build = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(build) == {"packages"}
    assert sorted(build["packages"]) == sorted(PACKAGES)
    assert PROJECT["project"]["scripts"] == {
        "export-onnx": "export.cli:main",
        "edge-demo": "edge_demo.cli.main:main",
    }


# --- what a fresh process loads ------------------------------------------------------------------


def loaded_after(code: str, *arguments: str) -> set[str]:
    """Top-level modules, and this project's modules, that a new process has after `code`."""
    code += "\nimport sys, json; sys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stderr.splitlines()[-1])
    return {top(name) for name in names} | {n for n in names if top(n) in PACKAGES}


def test_edge_demo_with_all_its_modules_loads_nothing_of_the_notebook():
    code = """
import importlib, pkgutil, edge_demo
for module in pkgutil.walk_packages(edge_demo.__path__, "edge_demo."):
    importlib.import_module(module.name)
"""
    loaded = loaded_after(code)
    assert {name for name in MODULES if top(name) == "edge_demo"} <= loaded
    assert loaded >= ON_THE_DEVICE
    assert not loaded & {*NOT_ON_THE_DEVICE, *OPTIONAL_ON_THE_DEVICE}


@pytest.mark.parametrize("name", ["gemma_keras", "gemma_keras.config", "gemma_keras.checkpoints"])
def test_configuration_and_checkpoints_start_no_keras(name):
    loaded = loaded_after(f"import {name}")
    assert name in loaded
    assert not loaded & set(KERAS)


def test_reading_a_gguf_starts_no_keras(tmp_path):
    meta = metadata("gemma3", 2)
    path = write_gguf(tmp_path / "tiny.gguf", meta, tensors(meta))
    code = """
import sys
from gemma_keras import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
assert checkpoint.weights["layers.1.mlp.up"].shape == (96, 160)
"""
    loaded = loaded_after(code, str(path))
    assert "gguf" in loaded
    assert not loaded & set(KERAS)


@pytest.mark.parametrize("module", ["edge_demo", "export", "edge_demo.cli.main", "export.cli"])
def test_onnxruntimes_telemetry_is_off_before_it_can_be_imported(module):
    """onnxruntime reads the variable once, when it is imported; who has set it keeps his value."""
    code = f"import sys, os, {module}; print(os.environ['ORT_DISABLE_TELEMETRY'], *sys.modules)"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("ORT_")}
    for extra, value in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=bare | extra
        )
        found, *loaded = done.stdout.split()
        assert found == value and "onnxruntime" not in loaded


@pytest.mark.parametrize(
    "path",
    [p for folder in ("benchmarks", "tools") for p in sorted((ROOT / folder).rglob("*.py"))],
    ids=lambda path: path.stem,
)
def test_what_imports_onnxruntime_itself_imports_edge_demo_or_export_first(path):
    order = [i.module for i in imports_of("", ast.parse(path.read_text()), False) if not i.function]
    tops = [top(module) for module in order]
    for name in ("onnxruntime", "onnxruntime_genai"):
        if name in tops:
            assert {"edge_demo", "export"} & set(tops[: tops.index(name)])


EDGE_COMMANDS = [
    [],
    ["generate"],
    ["chat"],
    ["embed"],
    ["serve"],
    ["bench"],
    ["score"],
    ["compare"],
    ["guard-eval"],
    ["inspect"],
    ["doctor"],
]


@pytest.mark.parametrize(
    ("module", "command"),
    [("export.cli", []), *(("edge_demo.cli.main", command) for command in EDGE_COMMANDS)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_help_loads_nothing_heavy(module, command):
    code = f"""
import {module} as cli
try:
    cli.main({[*command, "--help"]!r})
except SystemExit as end:
    assert end.code == 0
else:
    raise AssertionError("--help did not end the command")
"""
    loaded = loaded_after(code)
    assert module in loaded
    device = {*ON_THE_DEVICE, *OPTIONAL_ON_THE_DEVICE}
    assert not loaded & {*KERAS, *device, "onnx", "onnx_ir", "gguf", "rich"}
