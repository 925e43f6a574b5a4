"""Any error in any command: a sentence that can be reported, status 1, a traceback if wanted."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

from edge_demo.unexpected import unexpected
from tests.gguf_files import metadata, tensors, write_gguf
from tests.test_architecture import EDGE_COMMANDS, ROOT

FAULT = 'raise KeyError("gemma3_1b")'
# A command in a process of its own, in which a part of this project has a fault.
EDGE = """
import sys
import edge_demo.cli.main as cli
from edge_demo.bundle.reader import Bundle
def open(path):
    {fault}
Bundle.open = open
sys.exit(cli.main(sys.argv[1:]))
"""
EXPORT = """
import sys
from export import cli
from export.bundle import writer
def write_card(*arguments):
    {fault}
writer.write_card = write_card
sys.exit(cli.main(sys.argv[1:]))
"""
ARGUMENTS = {
    "generate": ["x", "--prompt", "p"],
    "chat": ["x", "--prompt", "p"],
    "embed": ["x", "text"],
    "serve": ["x", "--port", "0"],
    "guard-eval": ["x", "examples/guard_prompts.csv"],
    "bench": ["x"],
    "score": ["x", "--text", "README.md"],
    "compare": ["x", "y", "--text", "README.md"],
    "inspect": ["x"],
    "doctor": ["x"],
}


def run(code, *arguments, cwd=ROOT):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def check_sentence(line, command):
    place = r"\((edge_demo|export)/[\w/]+\.py line \d+, gemma-keras "
    assert re.match(f"{command}: unexpected KeyError: 'gemma3_1b' {place}", line)
    version = importlib.metadata.version("gemma-keras")
    for words in (f"gemma-keras {version}", "onnxruntime 1.", "numpy ", "Python 3.", "please report",
                  "again with --debug for the traceback"):  # fmt: skip
        assert words in line


@pytest.mark.parametrize("command", [name for names in EDGE_COMMANDS for name in names])
def test_a_fault_of_edge_demo_is_one_sentence(command):
    assert set(ARGUMENTS) == {name for names in EDGE_COMMANDS for name in names}
    done = run(EDGE.format(fault=FAULT), command, *ARGUMENTS[command])
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    check_sentence(line, "edge-demo")


def test_debug_shows_the_traceback_before_the_command_or_after_it():
    code = EDGE.format(fault=FAULT)
    for arguments in (["--debug", "inspect", "x"], ["inspect", "x", "--debug"]):
        done = run(code, *arguments)
        *trace, line = done.stderr.splitlines()
        assert done.returncode == 1 and line.startswith("edge-demo: unexpected KeyError")
        assert trace[0] == "Traceback (most recent call last):"
        assert trace[-1] == "KeyError: 'gemma3_1b'"


def test_an_expected_error_is_told_as_before_and_debug_shows_where_it_came_from(tmp_path):
    code = "import sys\nfrom edge_demo.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    done = run(code, "inspect", tmp_path / "none")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "does not exist" in line and "unexpected" not in line
    done = run(code, "inspect", tmp_path / "none", "--debug")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == line
    assert "BundleError" in done.stderr


def test_a_fault_of_export_onnx_is_one_sentence_and_nothing_is_left(tmp_path):
    meta = metadata("gemma3", 2)
    source = write_gguf(tmp_path / "tiny.gguf", meta, tensors(meta))
    out = tmp_path / "there" / "out"
    arguments = [source, out, "--recipe", "fp32", "--no-verify"]
    code = EXPORT.format(fault=FAULT)
    done = run(code, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    *progress, line = done.stderr.splitlines()
    assert all(step.endswith("…") for step in progress)
    check_sentence(line, "export-onnx")
    assert list(out.parent.iterdir()) == []
    done = run(code, *arguments, "--debug")
    assert "Traceback (most recent call last):" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("export-onnx: unexpected KeyError")


def test_python_m_export_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "export", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: export-onnx")


def test_the_sentence_is_short_and_one_line():
    try:
        raise ValueError("a\nb  c" + "x" * 5000)
    except ValueError as error:
        line = unexpected(error, [])
    assert line.startswith("unexpected ValueError: a b cxxx") and "…" in line
    assert len(line) < 500 and "\n" not in line
    assert re.match(r"unexpected RuntimeError \(", unexpected(RuntimeError(), []))


# --- packages that are not there -----------------------------------------------------------------

BARE = [sys.executable, "-I", "-S", "-c"]  # no installed package is found


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (
            "from gemma_keras import GemmaCausalLM",
            "gemma_keras.GemmaCausalLM needs keras, which is not installed; run: "
            "pip install 'gemma-keras[keras]'",
        ),
        (
            "import gemma_keras; gemma_keras.open_checkpoint('m.gguf')",
            "gemma_keras.open_checkpoint needs numpy, which is not installed; run: "
            "pip install 'gemma-keras[keras]'",
        ),
        (
            "from edge_demo.cli.main import main; sys.exit(main(['generate', 'bundle']))",
            "edge-demo: numpy is not installed; run: pip install gemma-keras",
        ),
        (
            "from export.cli import main; sys.exit(main(['sample', 'out']))",
            "export-onnx: numpy is not installed; run: pip install 'gemma-keras[export]'",
        ),
    ],
)
def test_what_is_not_installed_is_said_with_what_to_run(code, sentence):
    code = f"import sys; sys.path.append({str(ROOT)!r})\n{code}"
    done = subprocess.run([*BARE, code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].removeprefix("ModuleNotFoundError: ") == sentence


def test_a_backend_that_is_not_installed_has_an_extra_of_its_own():
    code = "import sys; sys.modules['jax'] = None\nfrom gemma_keras import GemmaCausalLM"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": "jax"},
    )
    assert "needs jax, which is not installed; run: pip install 'gemma-keras[jax]'" in done.stderr


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("name, named", [("export.py", "file"), ("export", "folder")])
def test_what_of_the_users_is_called_export_is_named(tmp_path, imported, name, named):
    """Not blamed on packages that are all there, and not run either."""
    hides = tmp_path / name
    script = hides
    if named == "folder":
        hides.mkdir()
        script = hides / "__init__.py"
    script.write_text("print('the user’s own')\n")
    code = "import export\n" * imported
    code += "from gemma_keras.missing import check_export_is_ours\ncheck_export_is_ours()\n"
    (tmp_path / "notebook.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "the user’s own\n" * imported
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: gemma-keras's package `export` is hidden by {hides};")
    assert f"rename that {named}" in last
    script.unlink()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0
