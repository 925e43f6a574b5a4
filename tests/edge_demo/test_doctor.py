"""`edge-demo doctor` on this machine, and what it says of others."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re

import pytest

from edge_demo.bundle.graph_weights import bytes_per_token
from edge_demo.bundle.reader import Bundle
from edge_demo.cli.device_report import LIKELY_SHARE, describe, examine
from edge_demo.device.memory_limits import memory_limits
from edge_demo.engine import memory
from tests.edge_demo.test_device import pi_5
from tests.edge_demo.test_memory import MB, limited, linux
from tests.models import TEXT


@pytest.fixture(scope="module")
def tiny(tiny_bundles):
    return tiny_bundles / "gemma3-int8"


@pytest.fixture(scope="module")
def here(tiny):
    return examine([Bundle.open(tiny)])


def test_doctor_reports_to_programs(tiny, run_json):
    found = run_json("doctor", tiny)
    assert set(found) == {"device", "runs_here", "memory", "versions", "bundles", "sizes"}
    assert found["runs_here"] is True and found["sizes"] == []
    assert found["versions"]["python"] == platform.python_version()
    for package in ("onnxruntime", "numpy", "sentencepiece"):
        assert found["versions"][package] == importlib.metadata.version(package)
    (bundle,) = found["bundles"]
    assert (bundle["path"], bundle["recipe"], bundle["fits"]) == (str(tiny), "int8", True)
    assert bundle["needed"] == memory.estimate(Bundle.open(tiny)).resident
    whole = memory.estimate(Bundle.open(tiny), Bundle.open(tiny).engine)
    assert bundle["needed_for_all_logits"] == whole.resident
    assert bundle["longest_context"] == Bundle.open(tiny).context_length == 128


def test_decode_speed_is_memory_speed_by_bytes_a_token(tiny, here):
    (bundle,) = here["bundles"]
    read = bytes_per_token(tiny / "candidates.onnx")
    assert bundle["bytes_per_token"] == read
    most = here["memory"]["read_bytes_per_s"] / read
    assert bundle["tokens_per_s"]["most"] == pytest.approx(most)
    assert bundle["tokens_per_s"]["likely"] == pytest.approx([s * most for s in LIKELY_SHARE])


def test_doctor_tells_people(tiny, run):
    status, out, err = run("doctor", tiny)
    assert (status, err) == (0, "")
    for word in ("64-bit", "cores", "instructions", "memory reads", "GB/s", "swap", "huge pages",
                 "temperature", "throttling", "onnxruntime", "fits", "tokens/s", "disk"):  # fmt: skip
        assert word in out
    assert str(tiny) in out and "Models that fit" not in out


def test_without_a_bundle_common_sizes_are_judged(run, run_json):
    sizes = run_json("doctor")["sizes"]
    assert {(size["name"], size["recipe"]) for size in sizes} >= {
        (name, recipe)
        for name in ("Gemma 3 270M", "Gemma 3 1B", "Gemma 2B", "Gemma 3 4B")
        for recipe in ("int4", "int8")
    }
    for size in sizes:
        assert size["fits"] in (True, False) or memory_limits() == []
    out = run("doctor")[1]
    assert "Models that fit" in out and "Gemma 3 1B" in out


@pytest.mark.sample
def test_the_size_of_the_sample_is_that_of_its_bundle(sample_bundle):
    """The table of sizes is arithmetic on parameters; the estimate reads the graph."""
    row = next(
        s for s in examine([])["sizes"] if (s["name"], s["recipe"]) == ("Gemma 3 270M", "int8")
    )
    needed = memory.estimate(Bundle.open(sample_bundle))
    assert row["needed"] == pytest.approx(needed.resident, rel=0.05)
    speed = examine([Bundle.open(sample_bundle)])
    assert speed["bundles"][0]["bytes_per_token"] == pytest.approx(
        (100 * 1.14 + 168 * 0.625) * MB, rel=0.02
    )


def test_a_raspberry_pi_of_4_gb(tmp_path):
    found = examine([], pi_5(tmp_path))
    page = describe(found)
    assert page.startswith("Raspberry Pi 5 Model B Rev 1.0, Cortex-A76\n")
    for words in ("dot product, fp16; not i8mm", "4.25 GB, 2.99 GB available", "102 MB free",
                  "huge pages: always", "61 °C", "now frequency capped"):  # fmt: skip
        assert words in page
    fits = {(s["name"], s["recipe"]): s["fits"] for s in found["sizes"]}
    assert fits["Gemma 3 1B", "int8"] and fits["Gemma 2B", "int4"]
    assert not fits["Gemma 2B", "int8"] and not fits["Gemma 7B", "int4"]
    assert "does not fit" in page


@pytest.mark.parametrize(
    ("features", "bundle", "said"),
    [
        ("fp asimd", "wide-int8", "no 8-bit dot products and dequantizes.*--target armv8.0"),
        ("fp asimd", "wide-rows", None),
        ("fp asimd", "gemma3-fp32", None),
        ("fp asimd asimddp", "wide-rows", "int8 with --target armv8.2 loses less here"),
        ("fp asimd asimddp i8mm", "wide-rows", "has 8-bit dot products; int8 loses less here"),
        (
            "fp asimd asimddp",
            "wide-int8",
            "--target armv8.2 a token of context takes fewer instructions",
        ),
        ("fp asimd asimddp", "gemma3-board", None),
        ("fp asimd asimddp i8mm", "wide-int8", None),
        ("fp asimd asimddp i8mm", "gemma3-board", "made for a Raspberry Pi 5.*without --target"),
    ],
)
def test_a_bundle_for_another_processor_is_told(
    tmp_path, tiny_bundles, features, bundle, said, monkeypatch
):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(f"Features\t: {features}\n")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    report = examine([Bundle.open(tiny_bundles / bundle)], tmp_path)
    advice = report["bundles"][0]["advice"]
    shown = [line for line in describe(report).splitlines() if line.startswith("  advice")]
    if said is None:
        assert advice is None and not shown
    else:
        assert re.search(said, advice) and re.search(said, shown[0])


@pytest.mark.parametrize("bundle", ["wide-rows", "wide-int8"])
def test_a_bundle_for_boards_is_told_on_a_laptop(tiny_bundles, bundle, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    advice = examine([Bundle.open(tiny_bundles / bundle)])["bundles"][0]["advice"]
    assert (advice is not None and "slower than int8" in advice) == (bundle == "wide-rows")


def test_a_device_that_tells_nothing(tmp_path, tiny):
    """As macOS, which has neither `proc` nor `sys`."""
    found = examine([], tmp_path)
    assert found["memory"]["available"] is None
    assert all(size["fits"] is None for size in found["sizes"])
    page = describe(found)
    assert page.count("unknown") > 8 and "None" not in page


def test_a_32_bit_system_is_told_that_it_cannot_run_it(here):
    found = json.loads(json.dumps(here))
    found["device"] |= {"bits": 32, "machine": "armv7l"}
    found["runs_here"] = False
    page = describe(found)
    assert "armv7l, 32-bit" in page and "64-bit system" in page and "tokens/s" not in page


def test_what_is_missing_is_said(here):
    found = json.loads(json.dumps(here))
    found["versions"]["onnxruntime"] = None
    found["memory"]["read_bytes_per_s"] = found["bundles"][0]["tokens_per_s"] = None
    found["bundles"][0]["disk"] = None
    page = describe(found)
    assert "onnxruntime missing" in page
    assert page.count("unknown") >= 3


@linux
@pytest.mark.limits
def test_a_bundle_that_cannot_fit_is_said_so(tiny):
    needed = memory.estimate(Bundle.open(tiny), chunk=memory.CHUNKS[-1])
    status, out, err = limited("RLIMIT_AS", needed.address_space - 20 * MB, "doctor", tiny)
    assert status == 0, err
    assert "does not fit" in out and "under the resource limit RLIMIT_AS" in out
    assert f"does not fit: takes {needed.address_space / MB:,.0f} MB" in out  # as `generate` says


@linux
@pytest.mark.limits
def test_sampling_of_all_tokens_may_not_fit_where_the_likeliest_do(sample_bundle, tmp_path):
    bundle = Bundle.open(sample_bundle)
    few, all_ = (memory.estimate(bundle, g, chunk=memory.CHUNKS[-1]) for g in (None, bundle.engine))
    limit = (few.data + all_.data) // 2
    status, out, err = limited("RLIMIT_DATA", limit, "doctor", sample_bundle)
    assert status == 0, err
    assert "fits: takes" in out and "sampling without --top-k takes" in out
    assert "which does not fit" in out
    options = ("generate", sample_bundle, "--prompt", "a", "--max-tokens", 2, "--temperature", 1)
    status, _, err = limited("RLIMIT_DATA", limit, *options, "--top-k", 0)
    assert status == 1 and err.endswith("; sampling with --top-k 40 would fit\n")
    assert limited("RLIMIT_DATA", limit, *options, "--top-k", 40)[0] == 0
    (tmp_path / "text").write_text(TEXT)
    score = ("score", sample_bundle, "--text", tmp_path / "text", "--length", 64)
    status, _, err = limited("RLIMIT_DATA", limit, *score)
    assert status == 1 and "needs about" in err and "--top-k" not in err


def test_doctor_refuses_a_bundle_that_is_none(refused, tmp_path):
    refused("doctor", tmp_path / "nowhere", names=[tmp_path / "nowhere", "does not exist"])
    (tmp_path / "bundle.json").write_text("{")
    refused("doctor", tmp_path, names=["bundle.json", "not JSON"])


def test_help_of_doctor(run):
    status, out, err = run("doctor", "--help")
    assert (status, err) == (0, "") and "BUNDLE" in out and "--json" in out
