"""`export-onnx`: a checkpoint to a bundle.

Nothing heavy is imported before the arguments are known to be good, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_demo.argument_parser import ArgumentParser

INTERRUPTED = 130
_MOST_PLAN_BYTES = 16 << 20
_PACKAGES = ("keras", "keras-hub", "onnx", "onnx-ir", "onnxruntime", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Export; the exit status is 0, 1 for a failure, 2 for a bad request, 130 for Ctrl-C."""
    arguments = None
    try:
        arguments = _parser().parse_args(argv)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        signal.signal(signal.SIGTERM, _as_interrupt)
        return _export(arguments)
    except KeyboardInterrupt:
        print(f"export-onnx: interrupted; {_what_was_kept(arguments)}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if arguments is not None and arguments.debug:
            traceback.print_exc()
        status, sentence = _failure(error)
        sentence = "; ".join([sentence, *getattr(error, "__notes__", ())])
        print(f"export-onnx: {' '.join(sentence.split())}", file=sys.stderr)
        return status


def _failure(error: Exception) -> tuple[int, str]:
    """The exit status, and why the export did not happen."""
    from edge_demo.unexpected import unexpected
    from export.errors import ExportError, ExportRequestError
    from gemma_keras.errors import ModelError
    from gemma_keras.missing import how_to_install, missing_package

    if isinstance(error, (ExportRequestError, ModelError)):
        return 2, str(error)
    if isinstance(error, MemoryError):
        return 1, str(error) or "out of memory"
    if isinstance(error, (ExportError, OSError)) and str(error):
        return 1, str(error)
    if isinstance(error, ImportError) and (package := missing_package(error)):
        return 1, f"{package} is not installed; run: {how_to_install(package, 'export')}"
    return 1, unexpected(error, _PACKAGES)


def _what_was_kept(arguments: argparse.Namespace | None) -> str:
    if arguments is not None:
        from export.calibrate.workspace import kept_work

        if kept_work(Path(os.path.realpath(arguments.out))):
            return "run the same command again to continue"
    return "nothing was kept"


def _as_interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="export-onnx",
        description="Export a Gemma checkpoint as a bundle that edge-demo runs.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a .gguf file, a name on the Hugging Face Hub, 'sample', or a folder: config.json "
        "with safetensors, a Keras preset, a LoRA adapter",
    )
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--base",
        metavar="SOURCE",
        help="the base model of an adapter (default: the model in its folder, or the one that "
        "it names)",
    )
    parser.add_argument(
        "--adapters",
        default="merge",
        help="merge: add an adapter to the weights; beside: export the base model, and write the "
        "adapter into the bundle's folder adapters, in PEFT's format (default: merge)",
    )
    parser.add_argument(
        "--instruction-tuned",
        action=argparse.BooleanOptionalAction,
        help="whether the model follows a turn template (default: as its chat template says)",
    )
    parser.add_argument(
        "--recipe",
        default="int8",
        help="weight format: int4, int8, int8-rows, int8-wide, fp16 or fp32 (default: int8)",
    )
    parser.add_argument(
        "--target",
        default="any",
        help="any processor; armv8.0, one without 8-bit dot products, such as a Raspberry Pi 4: "
        "int8 is then int8-rows; or armv8.2, a Raspberry Pi 5: int8 is then int8-wide "
        "(default: any)",
    )
    parser.add_argument(
        "--kl-budget",
        type=float,
        metavar="X",
        help="for int4: maximum mean KL divergence from the float model, in nats; matrices get "
        "8 bits until it is met (default: 0.033)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="a text file typical of the model's use; 'self' for text that the model generates, "
        "'text' for a page in this package, 'none' for no calibration (default: self for "
        "int4, text for int8)",
    )
    parser.add_argument(
        "--plan",
        metavar="FILE",
        help="JSON file that maps weight names to formats, as in bundle.json; it overrides the "
        "recipe's formats",
    )
    parser.add_argument(
        "--lowering",
        default="fused",
        help="fused: onnxruntime's operators; traced: only standard operators (default: fused)",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="float32",
        metavar="DTYPE",
        help="float32 or int8: type of the key-value cache of global layers in edge-demo "
        "(default: float32)",
    )
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="longest sequence, in tokens (default: the model's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not run the bundle and compare it with the Keras model",
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="a text file on which the bundle is compared with the float model, for its model "
        "card. Perplexity, KL divergence and same top token are measured over up to 24 "
        "windows of 512 tokens",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _export(arguments: argparse.Namespace) -> int:
    from export.options import ExportOptions
    from export.progress import ShowProgress

    if arguments.plan is not None:
        arguments.plan = _read_plan(arguments.plan)
    fields = (field.name for field in dataclasses.fields(ExportOptions))
    options = ExportOptions(**{name: getattr(arguments, name) for name in fields})

    with ShowProgress() as show:
        show.stage("opening")
        from export.pipeline import export_onnx

        result = export_onnx(
            arguments.source, arguments.out, arguments.recipe, options=options, on_progress=show
        )
    for remark in result.remarks:
        print(f"export-onnx: note: {remark}", file=sys.stderr)
    _print_result(result, arguments.json)
    return 0


def _read_plan(path: str) -> Any:
    """The plan in a JSON file: by itself, or in the manifest of a bundle."""
    from export.errors import ExportRequestError

    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(_MOST_PLAN_BYTES))
    except OSError as error:
        raise ExportRequestError(f"the plan {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ExportRequestError(f"the plan {path} is not JSON: {error}") from error
    return found["plan"] if isinstance(found, dict) and "plan" in found else found


def _print_result(result, as_json: bool) -> None:
    quality = result.quality
    if as_json:
        entry = dataclasses.asdict(result) | {"path": str(result.path)}
        print(json.dumps(entry))
        return
    print(f"{result.path}: {result.recipe}, {result.num_bytes / 1e6:,.0f} MB")
    for name in result.adapters:
        print(f"{result.path / 'adapters' / name}: an adapter, which is not merged")
    held_out = result.rounding.get("held_out")
    if held_out:
        raised = result.rounding["raised_to_8_bits"]
        print(
            f"mean KL {held_out['mean_kl']:.2g} nats of {result.rounding['kl_budget']:g} "
            f"allowed, same top token {held_out['same_top_token']:.1%}, on held-out "
            f"{held_out['text']}; {len(raised)} of {len(result.rounding['losses'])} groups "
            "of matrices got 8 bits"
        )
    if quality:
        print(quality.line)


if __name__ == "__main__":
    sys.exit(main())
