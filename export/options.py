"""What an export is asked for beside its source, its folder and its recipe."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.calibration_source import CalibrationSource, TextFile, calibration_source
from export.errors import ExportRequestError
from export.formats.targets import ANY, TARGETS

BUDGET_NEEDS = "a KL budget chooses between 4 and 8 bits, so it needs --recipe int4 and no plan"
LOWERINGS = ("fused", "traced")
KV_CACHE_DTYPES = ("float32", "int8")
MERGE, BESIDE = ADAPTERS = ("merge", "beside")
_Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Options of `export.export_onnx` and of `export-onnx`. They check themselves when made.

    Attributes:
        base: the model that a LoRA adapter is for, where its folder does not say it.
        adapters: `merge` adds LoRA to the weights. `beside` exports the base model, and writes each
            adapter into the bundle's folder `adapters/NAME`, in PEFT's format.
        instruction_tuned: whether the model follows a turn template; by default what its chat
            template says.
        kl_budget: for `int4`, the mean KL divergence from the float model that the bundle may
            have, in nats, on text it was not calibrated on. Matrices get 8 bits until it is kept.
            By default the recipe's own.
        calibration: what the model is calibrated on: a UTF-8 text file that shows its later use,
            `"self"` (text that it writes), `"text"` (a page of this package), `"none"`, or a
            `CalibrationSource`. By default the recipe's own.
        plan: weight name to format, as `bundle.json` has it, in place of the recipe's formats for
            the weights it names; nothing is chosen by measurement then.
        target: the processors that the bundle is for. `any` is the default. `armv8.0` has no 8-bit
            dot products, as in a Raspberry Pi 4; `int8` stores weights by rows there (the recipe
            `int8-rows`). `armv8.2` is that of a Raspberry Pi 5; `int8` has wider blocks there
            (`int8-wide`).
        lowering: `fused`, graphs of onnxruntime's operators, or `traced`, graphs of standard
            operators made from the Keras code, which any ONNX runtime can run.
        kv_cache_dtype: how the engine keeps keys and values of layers that see the whole text:
            `float32`, or `int8`, which makes long texts faster and smaller in memory.
        max_context: the longest sequence the bundle is for, in tokens; the model's by default.
        overwrite: whether a bundle that stands there is replaced.
        verify: whether the bundle is run and compared with the Keras layers.
        report: a UTF-8 text file on which the bundle is measured against the float model, as
            `edge-demo compare` does, for the model card.

    Raises:
        ExportRequestError: a value, or two of them together, cannot be used with any model.
    """

    base: _Path | None = None
    adapters: str = MERGE
    instruction_tuned: bool | None = None
    kl_budget: float | None = None
    calibration: _Path | CalibrationSource | None = None
    plan: Mapping[str, Mapping[str, Any]] | None = None
    target: str = ANY
    lowering: str = "fused"
    kv_cache_dtype: str = "float32"
    max_context: int | None = None
    overwrite: bool = False
    verify: bool = True
    report: _Path | None = None

    def __post_init__(self) -> None:
        if self.adapters not in ADAPTERS:
            raise ExportRequestError(
                f"adapters is {self.adapters!r}; it must be {' or '.join(map(repr, ADAPTERS))}"
            )
        if self.target not in TARGETS:
            raise ExportRequestError(
                f"there is no target {self.target!r}; choose one of {', '.join(TARGETS)}"
            )
        if self.lowering not in LOWERINGS:
            raise ExportRequestError(
                f"there is no lowering {self.lowering!r}; choose one of {', '.join(LOWERINGS)}"
            )
        if self.lowering != "fused" and TARGETS[self.target].one_token_attention:
            raise ExportRequestError(
                f"{self.lowering} graphs are the same for any target; omit --target"
            )
        self._check_kv_cache_dtype()
        self._check_kl_budget()
        if isinstance(self.calibration_source, TextFile):
            _check_file(self.calibration_source.path, "calibration text")
        if self.report is not None:
            _check_file(self.report, "text of the report")

    @property
    def calibration_source(self) -> CalibrationSource | None:
        """What `calibration` means; `None` leaves it to the recipe."""
        return None if self.calibration is None else calibration_source(self.calibration)

    def _check_kv_cache_dtype(self) -> None:
        dtype = self.kv_cache_dtype
        if dtype not in KV_CACHE_DTYPES:
            raise ExportRequestError(
                f"keys and values are kept as {' or '.join(KV_CACHE_DTYPES)}, not as {dtype!r}"
            )
        if dtype != "float32" and self.lowering != "fused":
            raise ExportRequestError(
                f"{self.lowering} graphs keep keys and values as float32; use --lowering fused"
            )

    def _check_kl_budget(self) -> None:
        budget = self.kl_budget
        if budget is None:
            return
        if self.plan is not None:
            raise ExportRequestError(BUDGET_NEEDS)
        if not 0 < budget < math.inf:
            raise ExportRequestError(f"the KL budget must be a positive number, not {budget}")


def _check_file(path: _Path, what: str) -> None:
    if not Path(path).is_file():
        problem = "is not a file" if Path(path).exists() else "does not exist"
        raise ExportRequestError(f"the {what} {path} {problem}")
