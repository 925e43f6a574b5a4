"""What the model card of a text embedder says, where others' cards differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.bundle.markdown import plain, table

_RUNNING = """\
## How to run it

On a small device, with onnxruntime, numpy and sentencepiece only:

```
pip install gemma-keras
edge-demo embed FOLDER "Which planet is red?"{prompt}
```

`edge-demo serve FOLDER` answers `/v1/embeddings` as OpenAI's API does.

Other runtimes can run `model.onnx`: it takes `input_ids` and `attention_mask`, int64
`(batch, length)`, and returns `sentence_embedding`, float32 `(batch, {dimensions})`. A text is
`<bos>`, its tokens and `<eos>`."""


def kind(embedder: Mapping[str, Any]) -> str:
    """What it is, in two sentences.

    Args:
        embedder: the manifest's entry.
    """
    sentence = f"It embeds texts: a vector of {embedder['dimensions']:,} numbers for each."
    if not embedder["prompts"]:
        return sentence
    shown = ", ".join(f"{plain(n)} ({plain(p)})" for n, p in embedder["prompts"].items())
    return f"{sentence} Prompts that it was trained with: {shown}."


def quality(measured: Mapping[str, Any] | None) -> str:
    """How near its vectors are to those of its source.

    Args:
        measured: `export.bundle.verify_embedder.EmbedderQuality` as data, if it was measured.
    """
    title = "## How near it is to the model it was made from\n\n"
    if measured is None:
        return title + "Not measured."
    rows = [
        ("least cosine to the reference's vector", f"{measured['least_cosine']:.6f}"),
        ("mean cosine to it", f"{measured['mean_cosine']:.6f}"),
        ("mean cosine of different texts, to judge it by", f"{measured['cosine_of_others']:.6f}"),
    ]
    over = f"Over {measured['texts']:,} texts, {plain(measured['against'])}:"
    return f"{title}{over}\n\n{table(('', 'measured'), rows)}"


def running(embedder: Mapping[str, Any]) -> str:
    """How to run it.

    Args:
        embedder: the manifest's entry.
    """
    prompt = " --prompt-name query" if "query" in embedder["prompts"] else ""
    return _RUNNING.format(prompt=prompt, dimensions=embedder["dimensions"])
