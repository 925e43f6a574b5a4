"""Runs `edge-demo generate BUNDLE --batch FILE --out FILE`."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from edge_demo.bundle.reader import Bundle
from edge_demo.cli.answering import open_tokenizer, sampler_settings, stop_texts
from edge_demo.cli.terminal import Progress, note
from edge_demo.device.memory_limits import peak_rss_bytes
from edge_demo.errors import RequestError
from edge_demo.text.answer import Completion
from edge_demo.text.batch import Answer, BatchRunner
from edge_demo.text.batch_items import Item, read_items
from edge_demo.text.batch_results import Results
from edge_demo.units import megabytes

_ROWS = 4


def _result(item: Item, answer: Answer) -> dict[str, Any]:
    if not isinstance(answer, Completion):
        return {"id": item.id, "error": str(answer)}
    return {
        "id": item.id,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(answer.prompt_ids),
        "tokens": len(answer.ids),
    }


def run_batch(arguments: argparse.Namespace) -> int:
    """Continue all prompts of a file; exit status 1 if some of them failed."""
    if arguments.out is None:
        raise RequestError("--batch needs --out FILE to write its results")
    settings = sampler_settings(arguments)
    settings["seed"] = arguments.seed or 0
    defaults = Item(
        index=0,
        id=None,
        prompt="",
        max_tokens=arguments.max_tokens,
        stop=stop_texts(arguments),
        **settings,
    )
    defaults.sampler()  # raises an error for options out of range
    bundle = Bundle.open(arguments.bundle)
    items = read_items(arguments.batch, defaults, tuned=bundle.tokenizer.chat is not None)
    if os.path.exists(arguments.out) and os.path.samefile(arguments.batch, arguments.out):
        raise RequestError(
            f"--out {arguments.out} is the file of prompts; choose another file for the results"
        )
    start = time.perf_counter()
    rows = arguments.batch_size or _ROWS
    # before the results are opened, so that a refused request does not destroy earlier results
    tokenizer, threads = open_tokenizer(bundle), arguments.threads
    runner = BatchRunner(bundle, tokenizer, items, rows, threads, arguments.force)
    keys = [item.key(bundle.fingerprint) for item in items]
    tokens = interrupted = 0
    with Results(arguments.out, keys, arguments.overwrite) as results:
        rest = [item for item in items if item.index not in results.done]
        before = len(items) - len(rest)
        if before:
            note(f"{before:,} of {len(items):,} results are already in {arguments.out}")
        try:
            progress = Progress("prompt")
            for done, (item, answer) in enumerate(runner.run(rest), start=1):
                results.add(item.index, _result(item, answer))
                tokens += len(answer.ids) if isinstance(answer, Completion) else 0
                progress(done, len(rest))
        except KeyboardInterrupt:
            interrupted = 1
        done, errors = len(results.done), results.errors
    seconds = time.perf_counter() - start
    report = {
        "prompts": len(items),
        "done": done,
        "done_before": before,
        "errors": errors,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if arguments.json:
        print(json.dumps(report))
    else:
        note(
            f"{done:,} of {len(items):,} prompts done · {tokens:,} tokens in {seconds:.1f} s · "
            f"{tokens / seconds:.0f} tokens/s · {megabytes(peak_rss_bytes())}"
        )
    if errors:
        note(f'{errors:,} of them failed; their lines in {arguments.out} have an "error"')
    if interrupted:
        note("run the same command again to continue")
        return 130
    return 1 if errors else 0
