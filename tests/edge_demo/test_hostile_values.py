"""Values that are endless, have several lines or steer terminals: refused in a line that can be read."""

from __future__ import annotations

import copy
import json

import pytest

from edge_demo.errors import LONGEST_MESSAGE, EdgeError, brief
from tests.edge_demo.bundle_files import copy_bundle, read_manifest

VALUES = {
    "long": "A" * 5000,
    "lines": "x y\n" * 1200,
    "escapes": "\x1b]0;t\x07\r\n\u2028" * 300,
    "digits": "9" * 4000,
    "more digits": "9" * 5000,
    "no text": "\udce9" * 3000,
}
PROMPT = ("--prompt", "The", "--max-tokens", 2)
LONGEST = len("edge-demo compare: ") + LONGEST_MESSAGE + len("; see edge-demo compare --help")


@pytest.fixture
def said(run):
    """Run a command that may be refused: its status, and the one line that it says then."""

    def said(*arguments):
        status, out, err = run(*arguments)
        assert status in (0, 1, 2)
        if status and out == "":
            lines = [line for line in err.split("\n")[:-1] if line.startswith("edge-demo")]
            assert len(lines) == 1 and err.endswith(lines[0] + "\n"), err
            assert len(lines[0]) <= LONGEST and not {"\r", "\u2028"} & set(lines[0])
        return status

    return said


@pytest.fixture
def arguments(tiny_bundles, tmp_path):
    """Each argument's place in a command, for a value."""
    bundle, tuned = tiny_bundles / "gemma3-fp32", tiny_bundles / "chat"
    (tmp_path / "text").write_text("The gardener waters the young trees.")
    (tmp_path / "tasks").write_text("Sport: a man\n1\nruns\nwalks\nsits\njumps\n")
    (tmp_path / "in").write_text('{"prompt": "a"}\n')
    batch = ("generate", bundle, "--batch", tmp_path / "in", "--max-tokens", 2)
    score = ("score", bundle, "--text", tmp_path / "text")
    return {
        "command": lambda v: (v,),
        "option": lambda v: ("generate", bundle, f"--{v}"),
        "one more": lambda v: ("generate", bundle, *PROMPT, v),
        "generate": lambda v: ("generate", v, *PROMPT),
        "chat": lambda v: ("chat", v, *PROMPT),
        "--prompt": lambda v: ("generate", bundle, "--prompt", v),
        "chat --prompt": lambda v: ("chat", bundle, "--prompt", v),
        "--system": lambda v: ("chat", bundle, *PROMPT, "--system", v),
        "tuned --system": lambda v: ("chat", tuned, *PROMPT, "--system", v),
        "--batch": lambda v: ("generate", bundle, "--batch", v, "--out", tmp_path / "out"),
        "--out": lambda v: (*batch, "--out", v),
        "--batch-size": lambda v: (*batch, "--out", tmp_path / "out", "--batch-size", v),
        "score": lambda v: ("score", v, "--text", tmp_path / "text"),
        "--text": lambda v: ("score", bundle, "--text", v),
        "--hellaswag": lambda v: ("score", bundle, "--hellaswag", v),
        "--tasks": lambda v: ("score", bundle, "--hellaswag", tmp_path / "tasks", "--tasks", v),
        "reference": lambda v: ("compare", v, bundle, "--text", tmp_path / "text"),
        "compare": lambda v: ("compare", bundle, v, "--text", tmp_path / "text"),
        "bench": lambda v: ("bench", v),
        "inspect": lambda v: ("inspect", v),
        "doctor": lambda v: ("doctor", v),
        **{
            option: lambda v, option=option: ("generate", bundle, *PROMPT, option, v)
            for option in [
                "--threads",
                "--max-tokens",
                "--temperature",
                "--top-k",
                "--top-p",
                "--min-p",
                "--seed",
                "--repeat-penalty",
                "--presence-penalty",
                "--frequency-penalty",
                "--repeat-last-n",
                "--draft",
                "--prompt-cache",
                "--stop",
            ]
        },
        **{
            option: lambda v, option=option: (*score, option, v)
            for option in ("--length", "--windows", "--stride")
        },
        **{
            f"bench {option}": lambda v, option=option: ("bench", bundle, option, v)
            for option in ("-p", "-n", "-d", "-t", "-r", "-o")
        },
    }


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_whatever_an_argument_is_it_is_refused_in_a_line(said, arguments, value):
    statuses = {name: said(*command(value)) for name, command in arguments.items()}
    assert set(statuses.values()) <= {0, 1, 2}
    good = {name for name, status in statuses.items() if status == 0}
    assert good <= {
        "--max-tokens", "--top-k", "--seed", "--repeat-last-n", "--stop", "--windows", "--tasks",
    }  # fmt: skip


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_whatever_a_line_of_a_batch_has_it_is_refused_in_a_line(
    said, tiny_bundles, tmp_path, value
):
    places = [{"prompt": "a", value: 1}, value, [value]]
    for key in [
        "messages",
        "id",
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "repeat_penalty",
        "stop",
        "presence_penalty",
        "frequency_penalty",
        "repeat_last_n",
    ]:
        for wrong in (value, [[value]], {value: value}):
            line = {"prompt": "a", key: wrong}
            places.append({key: wrong} if key == "messages" else line)
    for wrong in ({"role": value, "content": "a"}, {"role": "user", value: ""}, {"role": "user", "content": [value]}):  # fmt: skip
        places += [{"messages": [wrong]}]
    for number, place in enumerate(places):
        (tmp_path / f"in{number}").write_text(json.dumps(place))
        arguments = ("--batch", tmp_path / f"in{number}", "--out", tmp_path / "out")
        assert said("generate", tiny_bundles / "chat", *arguments) == 2, place


@pytest.mark.parametrize("number", ["9" * 4000, "-" + "9" * 4000, "1e400", "-1e400", "NaN"])
def test_numbers_beyond_all_are_refused_or_taken_as_what_they_say(
    said, tiny_bundles, tmp_path, number
):
    for key in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "repeat_penalty", "repeat_last_n"):  # fmt: skip
        (tmp_path / "in").write_text(f'{{"prompt": "a", "{key}": {number}}}')
        arguments = ("--batch", tmp_path / "in", "--out", tmp_path / key, "--max-tokens", 2)
        said("generate", tiny_bundles / "short", *arguments)


def paths(value, path=()):
    """Where everything in a JSON value is; of a list the first alone."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()  # fmt: skip
    for key, inner in entries:
        yield from paths(inner, (*path, key))


def test_whatever_a_manifest_says_it_is_refused_in_a_line(said, tiny_bundles, tmp_path):
    bundle = copy_bundle(tiny_bundles / "gemma3-int8", tmp_path / "bundle")
    good = read_manifest(bundle)
    # a plan has an entry for every weight, and they are all alike
    places = [path for path in paths(good) if path[0] != "plan" or len(path) < 3]
    assert len(places) > 150
    for place in places:
        for wrong in (VALUES["lines"], [VALUES["long"]], int(VALUES["digits"])):
            manifest = copy.deepcopy(good)
            inner = manifest
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = wrong
            (bundle / "bundle.json").write_text(json.dumps(manifest))
            said("inspect", bundle)
        if place[0] not in ("files", "plan", "provenance", "license"):
            said("generate", bundle, *PROMPT)


def test_a_value_is_cut_in_its_middle():
    assert brief("a\n b\t\u2028c") == "a b c"
    assert brief("x" * 200) == "x" * 200
    assert brief("b" * 300 + "e" * 300, 100) == "b" * 67 + "…" + "e" * 33
    assert len(str(EdgeError(f"the {'x' * 9000} is not a file"))) == LONGEST_MESSAGE + 1
    assert str(EdgeError(f"the {'x' * 9000} is not a file")).endswith("x is not a file")
