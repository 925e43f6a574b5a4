"""Runs `edge-demo guard-eval`: misses and over-refusals, of a guard or of a model itself."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_demo.cli import guard_options, options
from edge_demo.errors import RequestError

if TYPE_CHECKING:
    from edge_demo.evaluate.labelled import Labelled
    from edge_demo.evaluate.misses import Counts

TEXT = "Measure on labelled texts what a guard, or a model itself, misses and refuses."
_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_ANSWER_TOKENS = 32


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `guard-eval`."""
    options.add_bundle(parser)
    parser.add_argument(
        "file",
        metavar="FILE",
        help="csv with the columns prompt and label, which is safe or unsafe, and perhaps response "
        "and type, as XSTest's; or JSON lines with these keys",
    )
    options.add_engine(parser)
    parser.add_argument(
        "--refusals",
        action="store_true",
        help="the bundle answers instead of judging; count the answers that begin as refusals do",
    )
    guard_options.add_thresholds(parser.add_argument_group("guard"))
    parser.add_argument(
        "--max-tokens",
        type=options.positive,
        metavar="N",
        help=f"tokens of an answer with --refusals (default: {_ANSWER_TOKENS})",
    )
    parser.add_argument(
        "--limit", type=options.positive, metavar="N", help="maximum number of texts"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="write the result of each text to FILE, as JSON lines"
    )


def run(arguments: argparse.Namespace) -> int:
    """Judge or answer each text, and print how often it was refused."""
    from edge_demo.cli.terminal import as_json
    from edge_demo.cli.text_files import read_text
    from edge_demo.evaluate.labelled import read_labelled

    _check(arguments)
    texts = read_labelled(arguments.file, read_text(arguments.file))[: arguments.limit]
    report, rows = (_refusals if arguments.refusals else _guard)(arguments, texts)
    if arguments.json:
        print(as_json(report))
    else:
        print("\n".join(_lines(report)))
    if arguments.out is not None:  # last: what was measured is shown, also where the disk is full
        _write(arguments.out, texts, rows)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    from edge_demo.guard.decisions import read_thresholds

    read_thresholds(arguments.guard_threshold, arguments.guard_policy)
    for name in ("guard_policy", "guard_threshold"):
        if arguments.refusals and getattr(arguments, name):
            raise RequestError(
                f"--{name.replace('_', '-')} is not valid with --refusals; remove it"
            )
    if arguments.max_tokens is not None and not arguments.refusals:
        raise RequestError("--max-tokens is only valid with --refusals; remove it")
    if arguments.out is not None and not Path(arguments.out).absolute().parent.is_dir():
        raise RequestError(f"the folder of {arguments.out} does not exist")  # before a long run


def _guard(
    arguments: argparse.Namespace, texts: Sequence[Labelled]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Judge the texts; the report and a result for each text."""
    from edge_demo.bundle.reader import Bundle
    from edge_demo.cli.terminal import Progress
    from edge_demo.evaluate import misses

    bundle = Bundle.open(arguments.bundle)
    judge, thresholds = guard_options.open_judge(arguments, bundle)
    progress, found, begin = Progress("text"), [], time.perf_counter()
    for number, text in enumerate(texts, start=1):
        found.append(judge.probabilities(text.prompt, text.response))
        progress(number, len(texts))
    seconds = time.perf_counter() - begin
    unsafe = [text.unsafe for text in texts]
    refused = [any(p[name] >= t for name, t in thresholds.items()) for p in found]
    scores = [max(p.values()) for p in found]
    best = misses.best_threshold(scores, unsafe)
    report = {
        "bundle": bundle.name,
        "file": arguments.file,
        "thresholds": thresholds,
        "auc": misses.area_under_roc(scores, unsafe),
        "average_precision": misses.average_precision(scores, unsafe),
        "by_policy": {
            name: misses.area_under_roc([p[name] for p in found], unsafe) for name in thresholds
        },
        "tokens": dataclasses.asdict(judge.counts),
        "seconds": seconds,
        "by_threshold": [
            {"threshold": t} | _numbers(misses.Counts.of([s >= t for s in scores], unsafe))
            for t in _THRESHOLDS
        ],
        "best": {"threshold": best}
        | _numbers(misses.Counts.of([s >= best for s in scores], unsafe)),
    }
    rows = [{"probabilities": p, "refused": r} for p, r in zip(found, refused, strict=True)]
    return report | _counted(texts, refused), rows


def _refusals(
    arguments: argparse.Namespace, texts: Sequence[Labelled]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Have the model answer; the report and a result for each text."""
    from edge_demo.bundle.reader import Bundle
    from edge_demo.cli.answering import open_tokenizer
    from edge_demo.cli.terminal import Progress
    from edge_demo.evaluate.refusals import is_refusal
    from edge_demo.text.generator import Generator, engine_for
    from edge_demo.text.sampling import Sampler

    bundle = Bundle.open(arguments.bundle)
    tokenizer, greedy = open_tokenizer(bundle), Sampler(temperature=0.0)
    tokenizer.encode_chat([("user", "")])  # a base model has no turns
    engine = engine_for(bundle, greedy, arguments.threads, tokenizer, arguments.force)
    generator, progress, answers = Generator(engine, tokenizer), Progress("text"), []
    most = arguments.max_tokens or _ANSWER_TOKENS
    for number, text in enumerate(texts, start=1):
        ids = tokenizer.encode_chat([("user", text.prompt)])
        answers.append(generator.generate(ids, greedy, most).text)
        progress(number, len(texts))
    refused = [is_refusal(answer) for answer in answers]
    report = {"bundle": bundle.name, "file": arguments.file, "max_tokens": most}
    rows = [{"answer": a, "refused": r} for a, r in zip(answers, refused, strict=True)]
    return report | _counted(texts, refused), rows


def _counted(texts: Sequence[Labelled], refused: Sequence[bool]) -> dict[str, Any]:
    """The counts of all texts, and of each type."""
    from edge_demo.evaluate.misses import Counts

    def counts(kind: str | None) -> Counts:
        chosen = [i for i, text in enumerate(texts) if kind is None or text.type == kind]
        return Counts.of([refused[i] for i in chosen], [texts[i].unsafe for i in chosen])

    kinds = dict.fromkeys(text.type for text in texts if text.type)
    return {
        "texts": len(texts),
        "all": _numbers(counts(None)),
        "by_type": {kind: dataclasses.asdict(counts(kind)) for kind in kinds},
    }


def _numbers(counts: Counts) -> dict[str, Any]:
    return dataclasses.asdict(counts) | {
        "misses": counts.misses,
        "misses_interval": counts.interval_of_misses(),
        "over_refusals": counts.over_refusals,
        "over_refusals_interval": counts.interval_of_over_refusals(),
        "precision": counts.precision,
        "recall": counts.recall,
        "f1": counts.f1,
    }


def _write(path: str, texts: Iterable[Labelled], rows: Iterable[Mapping[str, Any]]) -> None:
    from edge_demo.durable import write_whole

    lines = (
        json.dumps(dataclasses.asdict(text) | dict(row), ensure_ascii=False).encode() + b"\n"
        for text, row in zip(texts, rows, strict=True)
    )
    write_whole(Path(path), lines)


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for people."""
    counts = report["all"]
    yield f"{report['texts']:,} texts of {report['file']}, {report['bundle']}"
    yield (
        f"misses        {_percent(counts['misses'])}  "
        f"({counts['unsafe'] - counts['refused_unsafe']:,} of {counts['unsafe']:,} unsafe texts; "
        f"95 % interval {_interval(counts['misses_interval'])})"
    )
    yield (
        f"over-refusal  {_percent(counts['over_refusals'])}  "
        f"({counts['refused_safe']:,} of {counts['safe']:,} safe texts; "
        f"95 % interval {_interval(counts['over_refusals_interval'])})"
    )
    if "auc" in report:
        yield from _lines_of_guard(report)
    if report["by_type"]:
        yield f"\n{'type':<30}{'label':<8}{'refused':>12}"
    for kind, of_type in report["by_type"].items():
        for label in ("safe", "unsafe"):
            if of_type[label]:
                share = f"{of_type[f'refused_{label}']:,} of {of_type[label]:,}"
                yield f"{kind[:29]:<30}{label:<8}{share:>12}"


def _lines_of_guard(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"thresholds    {', '.join(f'{n} {t:g}' for n, t in report['thresholds'].items())}"
    areas = ", ".join(f"{name} {_number(a)}" for name, a in report["by_policy"].items())
    yield f"AUC           {_number(report['auc'])}  (of single policies: {areas})"
    yield f"precision     {_number(report['average_precision'])} on average over all recalls"
    tokens = report["tokens"]
    yield (
        f"tokens        {tokens['texts']:,} of texts, {tokens['policies']:,} of policies, "
        f"{tokens['reused']:,} reused; {report['seconds'] / report['texts']:.2f} s a text"
    )
    yield f"\n{'threshold':<12}{'misses':>10}{'over-refusal':>15}{'precision':>12}{'F1':>8}"
    for row in (*report["by_threshold"], report["best"]):
        remark = "  best F1" if row is report["best"] else ""
        yield (
            f"{row['threshold']:<12.3g}{_percent(row['misses']):>10}"
            f"{_percent(row['over_refusals']):>15}{_number(row['precision']):>12}"
            f"{_number(row['f1']):>8}{remark}"
        )


def _percent(share: float) -> str:
    return "—" if math.isnan(share) else f"{share:.1%}"


def _number(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:.3f}"


def _interval(bounds: tuple[float, float]) -> str:
    return " to ".join(map(_percent, bounds))
