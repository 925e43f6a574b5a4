"""The documents keep their promises: links lead somewhere, commands work, generated pages are fresh.

Guides name files such as `my-gemma` and `my-bundle`. Their tests run in a folder that holds small
models under these names, so every command runs as it is written; see `tests/run_guide.py`.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.models import TEXT
from tests.run_guide import blocks, command_lines
from tests.test_architecture import FLOORS
from tools import floors_picture, quality_plot
from tools.reference import COMMAND, FOLDER, commands
from tools.reference.__main__ import PAGES

ROOT = Path(__file__).parents[1]
PACKAGES = ("gemma_keras", "export", "edge_demo")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob(".github/**/*.md")]
)
# What was true on its day, and may name what is no more.
OF_THEIR_DAY = {ROOT / "CHANGELOG.md", *(ROOT / "docs" / "lab-notes").glob("*.md")}
CURRENT = [path for path in DOCUMENTS if path not in OF_THEIR_DAY]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
_LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_PATH = re.compile(
    r"`((?:gemma_keras|export|edge_demo|tests|tools|benchmarks|docs|examples|\.github)/[\w./-]+)`"
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(markdown: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", markdown, flags=re.M | re.S)


# --- links and names -----------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for title in re.findall(r"^#+ (.*)$", without_code(path.read_text()), re.M):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(document):
    for match in _LINK.finditer(without_code(document.read_text())):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"\w+:", target):
            continue
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), f"{name_of(document)} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(path), f"{name_of(document)}: no heading {match['target']}"


@pytest.mark.parametrize("document", CURRENT, ids=name_of)
def test_every_path_that_a_document_names_is_there(document):
    named = _PATH.findall(document.read_text())
    gone = [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
    assert not gone, f"{name_of(document)} names files that are not there"


def test_every_document_that_code_names_is_there():
    for package in (*PACKAGES, "tests", "tools", "benchmarks", "examples"):
        for path in (ROOT / package).rglob("*.py"):
            for document in re.findall(r"(?<![\w/])docs/[\w/-]+\.md", path.read_text()):
                assert (ROOT / document).exists(), f"{name_of(path)} names {document}"


def test_every_document_is_reached_from_the_readme():
    reached, left = set(), [ROOT / "README.md"]
    while left:
        path = left.pop()
        if path in reached or path.suffix != ".md":
            continue
        reached.add(path)
        links = _LINK.finditer(without_code(path.read_text()))
        targets = [match["target"].partition("#")[0] for match in links]
        left += [(path.parent / t).resolve() for t in targets if t and ":" not in t]
    assert not {path for path in DOCUMENTS if ".github" not in path.parts} - reached


# --- the README ----------------------------------------------------------------------------------


def test_the_readme_fits_a_first_minute():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert not [line for line in lines if len(line) > 120]


def test_the_figures_of_the_readmes_table_are_those_of_the_benchmarks():
    readme = quality_plot.table((ROOT / "README.md").read_text(), "mean KL")
    benchmarks = quality_plot.DATA.read_text()
    quality = quality_plot.table(benchmarks, "mean KL")
    speed = quality_plot.table(benchmarks, "decode, tokens/s")
    assert len(readme) == 4
    for name, (_, *figures) in ((name, row.items()) for name, row in readme.items()):
        for column, figure in figures:
            assert figure == (quality[name] | speed[name])[column], f"{name}: {column}"


def test_the_plot_is_drawn_from_the_benchmarks():
    points = quality_plot.points(quality_plot.DATA.read_text())
    assert {"int4", "int8", "llama.cpp Q4_K_M"} <= {point.name for point in points}
    assert quality_plot.PICTURE.read_text() == quality_plot.draw(points), (
        "docs/images/quality.svg is stale; run: python -m tools.quality_plot"
    )


def test_the_picture_of_the_floors_is_drawn_from_their_data():
    assert floors_picture.PICTURE.read_text() == floors_picture.draw(FLOORS), (
        "docs/images/floors.svg is stale; run: python -m tools.floors_picture"
    )


def test_make_help_lists_every_target_for_people():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (demo .*)$", makefile, re.M)[1].split()
    assert set(targets) <= set(re.findall(r"^([\w-]+):.*  ## \w", makefile, re.M))


# What documents of this project do not say; see "Plain English" in CONTRIBUTING.md.
QUAINT = r"\b(is|are) told\b|whole or not at all|\bhas not the\b|of the sample(?!')|anew"


@pytest.mark.parametrize("document", CURRENT, ids=name_of)
def test_documents_are_plain_english(document):
    if document.name in (*PAGES, "CONTRIBUTING.md"):
        return  # made from the code; shows examples
    assert not re.findall(rf".*(?:{QUAINT}).*", document.read_text())


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_what_the_code_says(page):
    assert (FOLDER / page).read_text() == PAGES[page](), (
        f"docs/reference/{page} is stale; run: {COMMAND}"
    )


def test_every_option_of_every_command_is_in_the_reference():
    page = (FOLDER / "commands.md").read_text()
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    parsers = dict(commands.parsers())
    assert set(sections) == set(parsers) and len(parsers) > 8
    for name, parser in parsers.items():
        options = set(parser._option_string_actions) - {"-h", "--help"}
        written = set(re.findall(r"`(-[\w-]+)", sections[name]))
        assert options == written, name


# --- what is written as code ---------------------------------------------------------------------


@pytest.mark.parametrize("document", CURRENT, ids=name_of)
def test_every_command_in_a_document_has_options_that_exist(document):
    parsers = dict(commands.parsers())
    for block in blocks(document.read_text()):
        for line in command_lines(block.code) if block.language in ("bash", "text") else ():
            for words in _commands_in(line):
                name = " ".join(words[:2]) if words[0] == "edge-demo" else words[0]
                known = parsers[name]._option_string_actions
                options = [w.partition("=")[0] for w in words if re.match(r"--?[a-z]", w)]
                assert set(options) <= set(known), line


def _commands_in(line: str) -> list[list[str]]:
    """The calls of our commands in a line of shell, each as words."""
    found = []
    for part in re.split(r"[|;&]|\s{3,}", line):
        call = re.search(r"(?:^|\s)((?:export-onnx|edge-demo) (?!SOURCE|COMMAND).*)", part)
        if call and "[options]" not in part and not part.lstrip().startswith("==>"):
            found.append(shlex.split(call[1].replace("…", ""), comments=True))
    return found


@pytest.mark.parametrize("document", CURRENT, ids=name_of)
def test_every_import_in_a_document_works(document):
    if document.parent == FOLDER and document.name in PAGES:
        return  # signatures, made from the code
    for block in blocks(document.read_text()):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
                for alias in node.names:
                    assert alias.name in _names_of(node.module), ast.unparse(node)


def _names_of(module: str) -> set[str]:
    """What a module defines, or says that it offers, without running it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    names = set()
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names |= set(ast.literal_eval(node.value))
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_that_a_package_offers_is_in_the_reference(package):
    page = (FOLDER / "python-api.md").read_text()
    section = page.partition(f"\n## {package}\n")[2].partition("\n## ")[0]
    assert not set(importlib.import_module(package).__all__) - set(
        re.findall(r"^### (\w+)$", section, re.M)
    )


# --- guides --------------------------------------------------------------------------------------


def write_adapter(folder: Path) -> None:
    """A LoRA of rank 2 on the queries of the first block, as PEFT writes it."""
    from safetensors.numpy import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
    config |= {"target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = np.random.default_rng(3)
    shapes = {"lora_A": (2, 96), "lora_B": (128, 2)}
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    matrices = {
        f"{layer}.{name}.weight": random.normal(0, 0.1, shape).astype("float32")
        for name, shape in shapes.items()
    }
    save_file(matrices, folder / "adapter_model.safetensors")


def write_embedder(folder: Path) -> None:
    from tests.gemma_keras.embedder_files import write_tiny_embedder

    write_tiny_embedder(folder)


# What each file that guides name is in their tests.
MADE = {
    "my-gemma": lambda path, bundles: shutil.copytree(bundles / "tiny-gemma", path),
    "my-bundle": lambda path, bundles: path.symlink_to(bundles / "chat"),
    "small-bundle": lambda path, bundles: path.symlink_to(bundles / "chat"),
    "my-adapter": lambda path, bundles: write_adapter(path),
    "my-embedder": lambda path, bundles: write_embedder(path),
    "my-guard": lambda path, bundles: path.symlink_to(bundles.parent / "tiny-guard"),
    "texts.csv": lambda path, bundles: shutil.copy(ROOT / "examples" / "guard_prompts.csv", path),
    "text.txt": lambda path, bundles: path.write_text(TEXT * 3),
}


def prepare(guide: Path, folder: Path, bundles: Path) -> None:
    """Make the files that a guide's commands name."""
    to_run = "\n".join(block.code for block in blocks(guide.read_text()) if block.run)
    folder.mkdir()
    for name, make in MADE.items():
        if re.search(rf'[" ]{re.escape(name)}[" \n]', to_run):
            make(folder / name, bundles)


@pytest.fixture(scope="module")
def errors_of_guides(tiny_bundles, tiny_guard, tmp_path_factory):
    """What ended each guide; run once, in as few processes as there can be."""
    base = tmp_path_factory.mktemp("guides")
    environment = {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(base / "cache"),
        "KERAS_BACKEND": "jax",  # compiles these small models soonest
    }
    alone = [guide for guide in GUIDES if "XLA_FLAGS" in guide.read_text()]  # before JAX starts
    errors: dict[str, str] = {}
    for number, guides in enumerate([[g for g in GUIDES if g not in alone], *([g] for g in alone)]):
        for guide in guides:
            prepare(guide, base / guide.stem, tiny_bundles)
        results = base / f"{number}.json"
        pairs = [str(argument) for g in guides for argument in (g, base / g.stem)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.run_guide", str(results), *pairs],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=550,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        for guide, error in json.loads(results.read_text()).items():
            errors[guide] = error and f"{error}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return errors


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_the_commands_of_a_guide_work_as_written(guide, errors_of_guides):
    error = errors_of_guides[str(guide)]
    assert not error, f"{guide.name}: {error}"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guide_has_at_least_three_commands_that_a_test_runs(guide):
    commands_run = 0
    for block in blocks(guide.read_text()):
        if block.run:
            assert block.language in ("bash", "python")
            commands_run += 1 if block.language == "python" else len(command_lines(block.code))
    assert commands_run >= 3


# --- packages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_its_version_and_is_typed(package):
    module = importlib.import_module(package)
    assert module.__version__ == importlib.metadata.version("gemma-keras")
    assert (ROOT / package / "py.typed").is_file()
