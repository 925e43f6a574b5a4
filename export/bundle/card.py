"""Writes the model card: the bundle's `README.md`, as Hugging Face shows it.

Front matter: huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.bundle import embedder_card
from export.bundle.base_model import base_model
from export.bundle.ecosystem import CONFIG_FILE
from export.bundle.markdown import plain, table
from export.bundle.svg import bar_chart
from export.bundle.terms import Terms, terms_of
from export.formats.formats import Format, rows_and_inputs
from export.formats.projections import projection_specs
from export.formats.targets import ANY, TARGETS
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig

CARD_FILE = "README.md"
CHART_FILE = "kl_by_group.svg"


def write_card(
    folder: Path, manifest: Mapping[str, Any], report: Mapping[str, Any] | None = None
) -> None:
    """Write the card, and the chart if there are values to draw.

    Args:
        folder: the bundle.
        manifest: what `bundle.json` says; `files` is not read, since the card is among them.
        report: more about its quality, each part optional; other entries are left alone:
            `comparison`: what `edge-demo compare --json` prints, of this bundle against its
            reference, and `text`, what it was measured on;
            `kl_by_group`: name of a layer or a group of tensors to the mean KL that storing it as
            the bundle does costs, in nats.
    """
    report = report or {}
    ecosystem = (folder / CONFIG_FILE).exists()
    quality = manifest.get("quality")
    if "embedder" in manifest:
        kind = embedder_card.kind(manifest["embedder"])
        measured = embedder_card.quality(quality)
        running = embedder_card.running(manifest["embedder"])
    else:
        kind = _kind(manifest)
        measured = _quality(quality, report)
        running = _running(manifest, ecosystem)
    sections = [
        _front_matter(manifest, ecosystem),
        _introduction(manifest, kind),
        _making(manifest),
        measured,
        running,
        _licence(manifest),
    ]
    if groups := report.get("kl_by_group"):
        chart = bar_chart(groups, "Mean KL by group of tensors, in nats")
        (folder / CHART_FILE).write_text(chart, encoding="utf-8")
    (folder / CARD_FILE).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _config(manifest: Mapping[str, Any]) -> GemmaConfig:
    return GemmaConfig.from_dict(manifest["model"]["config"])


def _tuned(manifest: Mapping[str, Any]) -> bool:
    return manifest["tokenizer"]["chat"] is not None


def _quantized(manifest: Mapping[str, Any]) -> bool:
    return any(entry["block_size"] for entry in manifest["plan"].values())


def _front_matter(manifest: Mapping[str, Any], ecosystem: bool) -> str:
    lines = ["---", *_terms(manifest).front_matter]
    if base := base_model(manifest["provenance"], _config(manifest), _tuned(manifest)):
        lines.append(f"base_model: {base.repository}")
        if base.same_weights and _quantized(manifest):
            lines.append("base_model_relation: quantized")
    tags = ["onnx", "onnxruntime", "gemma", "gemma-keras"]
    tags += ["onnxruntime-genai", "transformers.js"] * ecosystem
    tags += [str(manifest["recipe"])] + ["conversational"] * _tuned(manifest)
    task = "sentence-similarity" if "embedder" in manifest else "text-generation"
    lines += ["library_name: onnx", f"pipeline_tag: {task}", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---"])


def _kind(manifest: Mapping[str, Any]) -> str:
    return (
        "It was tuned to answer in turns, as its chat template writes them."
        if _tuned(manifest)
        else "It is a base model: it continues text, it was not taught to answer."
    )


def _introduction(manifest: Mapping[str, Any], kind: str) -> str:
    model = manifest["model"]
    return (
        f"# {plain(model['name'])}, {plain(manifest['recipe'])}, for onnxruntime\n\n"
        f"{model['parameters']:,} parameters, a vocabulary of {model['vocabulary_size']:,}, up to "
        f"{model['context_length']:,} tokens. {kind}"
    )


def _making(manifest: Mapping[str, Any]) -> str:
    source = manifest["provenance"]
    origin = " ".join(plain(source[key]) for key in ("format", "file") if key in source)
    made = f"Made by gemma-keras with the recipe `{manifest['recipe']}` from "
    made += f"{origin or 'a Keras model'}{', held by a Keras model' * bool(source.get('through'))}."
    target = manifest.get("target", ANY)
    if target != ANY:
        made += (
            f" Made for `--target {target}` ({TARGETS[target].machines}): its weights and its "
            "attention suit these processors. It runs on any other, where a bundle without a "
            "target suits better."
        )
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    shapes = manifest.get("embedder", {}).get("projections", ())
    specs = weight_specs(_config(manifest)) | projection_specs(shapes)
    for spec in specs.values():
        entry = manifest["plan"].get(spec.name)
        fmt = Format(**entry) if entry else Format(32)
        name = _format_name(entry)
        counts[name] += 1
        sizes[name] += spec.shape[0] * 4 if entry is None else fmt.num_bytes(*rows_and_inputs(spec))
    rows = [
        (name, f"{counts[name]:,}", f"{size / 1e6:,.1f} MB") for name, size in sizes.most_common()
    ]
    return "## How it was made\n\n" + made + "\n\n" + table(("stored as", "tensors", "size"), rows)


def _format_name(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "float32 (norms)"
    fmt = Format(**entry)
    if not fmt.quantized:
        return f"float{fmt.bits}"
    name = f"int{fmt.bits}, a scale {'' if fmt.symmetric else 'and a zero point '}for every "
    name += f"{fmt.block_size} weights"
    return name + ", in two halves of 4 bits" * (fmt.planes == 2)


def _quality(quality: Mapping[str, Any] | None, report: Mapping[str, Any]) -> str:
    parts = ["## How near it is to the model it was made from"]
    if quality:
        rows = [
            ("mean KL divergence of the next token", f"{quality['mean_kl']:.2g} nats"),
            ("same most likely token", f"{quality['same_top_token']:.1%}"),
            (
                "greatest difference of a logit (their standard deviation)",
                f"{quality['max_logit_difference']:.2g} ({quality['logit_spread']:.2g})",
            ),
        ]
        parts.append(f"Over {quality['tokens']:,} tokens, {plain(quality['against'])}:")
        parts.append(table(("", "measured"), rows))
    if comparison := report.get("comparison"):
        on = f", on {plain(report['text'])}" if "text" in report else ""
        parts.append(
            f"Against {plain(comparison['reference']['recipe'])}, "
            f"{comparison['windows']:,} windows of {comparison['length']:,} tokens{on}; ± is the "
            "standard error:"
        )
        parts.append(_comparison_table(comparison))
    if report.get("kl_by_group"):
        parts.append(f"![Mean KL by group of tensors]({CHART_FILE})")
    if len(parts) == 1:
        parts.append("Not measured.")
    return "\n\n".join(parts)


def _comparison_table(comparison: Mapping[str, Any]) -> str:
    halves = [comparison["all_positions"], comparison["second_halves"]]

    def cells(key: str, digits: int, percent: bool = False) -> list[str]:
        scale, unit = (100, " %") if percent else (1, "")
        return [
            f"{scale * h[key]['value']:.{digits}f} ± {scale * h[key]['error']:.{digits}f}{unit}"
            for h in halves
        ]

    quantiles = {share: i for i, (share, _) in enumerate(halves[0]["kl_quantiles"])}
    rows = [
        ("perplexity", *cells("perplexity", 4)),
        ("perplexity of the reference", *cells("reference_perplexity", 4)),
        ("mean KL (nats)", *cells("kl", 6)),
        *(
            (label, *(f"{h['kl_quantiles'][quantiles[share]][1]:.6f}" for h in halves))
            for label, share in (("median KL", 0.5), ("99 % KL", 0.99), ("greatest KL", 1.0))
        ),
        (
            "RMS change of the right token's probability",
            *cells("rms_probability_difference", 3, True),
        ),
        ("same most likely token", *cells("same_top_token", 3, True)),
    ]
    return table(("", "all positions", "second halves"), rows)


def _running(manifest: Mapping[str, Any], ecosystem: bool) -> str:
    command = "chat" if _tuned(manifest) else "generate"
    prompt = "" if _tuned(manifest) else ' --prompt "Once upon a time"'
    here = f"""\
## How to run it

On a small device, with onnxruntime, numpy and sentencepiece only:

```
pip install gemma-keras
edge-demo {command} FOLDER{prompt}
```"""
    return here + "\n\n" + (_ELSEWHERE if ecosystem else _NOT_ELSEWHERE)


_NOT_ELSEWHERE = """\
Other runtimes do not load this bundle: its architecture or its tokenizer has no form in the files
that they read."""
_ELSEWHERE = """\
With onnxruntime-genai (its tokenizer adds the beginning-of-sequence token only when it is told to,
and Gemma needs it):

```python
import onnxruntime_genai as og

model = og.Model("FOLDER")
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=128)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```

With Optimum:

```python
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

model = ORTModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

With transformers.js:

```js
import { AutoModelForCausalLM, AutoTokenizer } from "@huggingface/transformers";

const model = await AutoModelForCausalLM.from_pretrained("FOLDER", { subfolder: "" });
const tokenizer = await AutoTokenizer.from_pretrained("FOLDER");
const output = await model.generate({ ...tokenizer("Once upon a time"), max_new_tokens: 64 });
console.log(tokenizer.decode(output[0]));
```

`edge-demo` runs `engine.onnx` and `candidates.onnx`, the others `model.onnx`; all stand over one
`model.onnx_data`.

onnxruntime 1.29 and later, and onnxruntime-genai, send telemetry to Microsoft unless
`ORT_DISABLE_TELEMETRY=1` is in the environment before they are loaded. `edge-demo` sets it."""


def _terms(manifest: Mapping[str, Any]) -> Terms:
    return terms_of(manifest["provenance"], _config(manifest), _tuned(manifest))


def _licence(manifest: Mapping[str, Any]) -> str:
    terms = _terms(manifest)
    return f"""\
## Licence

{terms.subject} is provided under and subject to the {terms.title} found at
[{terms.url}](https://{terms.url}). These weights are a Model Derivative of {terms.subject}: whoever
passes them on has to pass on `{manifest["license"]["notice"]}` and the terms with them, and may use
them only as the [{terms.policy}](https://{terms.policy_url}) allows. The weights were modified:
converted to ONNX and stored as {plain(manifest["recipe"])}."""
