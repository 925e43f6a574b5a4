"""What an export is asked for: options that check themselves, and texts as types."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edge_demo import Bundle
from export import ExportOptions, export_onnx
from export.calibration_source import (
    NoCalibration,
    OwnPage,
    SelfWritten,
    TextFile,
    calibration_source,
)
from export.cli import _parser
from export.errors import ExportRequestError
from tests.models import write_tiny_hf


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"lowering": "upper"}, "'upper'"),
        ({"kv_cache_dtype": "int4"}, "'int4'"),
        ({"kv_cache_dtype": "int8", "lowering": "traced"}, "--lowering fused"),
        ({"target": "armv9"}, "'armv9'; choose one of any, armv8.0, armv8.2"),
        ({"target": "armv8.2", "lowering": "traced"}, "omit --target"),
        ({"kl_budget": 0.0}, "positive"),
        ({"kl_budget": float("nan")}, "positive"),
        ({"kl_budget": 0.1, "plan": {}}, "plan"),
        ({"calibration": "no-such.txt"}, "no-such.txt"),
        ({"report": "no-such.txt"}, "no-such.txt"),
    ],
)
def test_options_check_themselves(fields, named):
    with pytest.raises(ExportRequestError, match=named):
        ExportOptions(**fields)


def test_a_text_to_calibrate_on_is_a_type(tmp_path):
    names = {"self": SelfWritten(), "text": OwnPage(), "none": NoCalibration()}
    for name, source in names.items():
        assert calibration_source(name) == calibration_source(source) == source
        assert ExportOptions(calibration=name).calibration_source == source
    file = tmp_path / "text.txt"
    file.write_text("words")
    assert ExportOptions(calibration=file).calibration_source == TextFile(file)
    assert calibration_source("./self") == TextFile(Path("self"))  # a file of that name
    assert ExportOptions().calibration_source is None


def test_fields_stand_in_place_of_those_of_options(tmp_path):
    source = tmp_path / "hf"
    write_tiny_hf(source, "gemma3")
    options = ExportOptions(max_context=64, calibration="none", verify=False)
    made = export_onnx(source, tmp_path / "a", "fp32", options=options)
    other = export_onnx(source, tmp_path / "b", "fp32", options=options, max_context=32)
    for result, context in ((made, 64), (other, 32)):
        assert Bundle.open(result.path).context_length == context
    with pytest.raises(TypeError, match="contxt"):
        export_onnx(source, tmp_path / "c", contxt=1)


def test_the_command_line_has_an_option_for_each_field():
    arguments = _parser().parse_args(["source", "out"])
    defaults = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(ExportOptions)}
    assert ExportOptions(**defaults) == ExportOptions()
