"""Do other runtimes find our tokens in a bundle, unchanged? Greedy, from the same token ids.

    python benchmarks/ecosystem.py build/sample-int8 --runtime onnxruntime-genai
    python benchmarks/ecosystem.py build/sample-int8 --runtime optimum
    python benchmarks/ecosystem.py build/sample-int8 --runtime transformers.js --modules FOLDER

Each runtime needs its own package beside what the device has: `onnxruntime-genai`; `optimum-onnx`,
in an environment of its own, since it wants an older transformers than the tests;
`npm install @huggingface/transformers` in FOLDER. Prints one JSON line: for each prompt whether its
ids and the answer's are ours, and, where the answers part, how far below our greatest logit their
token is: int8 activations make other threads and graphs round otherwise, so near-ties part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from edge_demo.text.tokenizer import Tokenizer

PROMPTS = (
    "The three primary colors are",
    "Once upon a time, in a small house by the sea,",
    "def fibonacci(n):\n    ",
)


def with_genai(folder: Path, count: int, modules: Path | None) -> list[list[int]]:
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + count, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        answers.append([int(i) for i in generator.get_sequence(0)])
    return answers


def with_optimum(folder: Path, count: int, modules: Path | None) -> list[list[int]]:
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    model = ORTModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        answers.append(model.generate(**inputs, max_new_tokens=count, do_sample=False)[0].tolist())
    return answers


_JAVASCRIPT = """
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';
const [modules, root, name, count, prompts] = JSON.parse(process.env.ECOSYSTEM);
const found = createRequire(modules + '/').resolve('@huggingface/transformers');
const { AutoModelForCausalLM, AutoTokenizer, env } = await import(pathToFileURL(found));
env.allowRemoteModels = false;
env.localModelPath = root;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, { subfolder: '' });
const answers = [];
for (const prompt of prompts) {
  const options = { max_new_tokens: count, do_sample: false };
  const output = await model.generate({ ...tokenizer(prompt), ...options });
  answers.push(Array.from(output.data, Number));
}
console.log(JSON.stringify(answers));
"""


def with_transformers_js(folder: Path, count: int, modules: Path | None) -> list[list[int]]:
    folder = folder.resolve()
    home = str((modules or Path()).resolve())
    request = json.dumps([home, str(folder.parent), folder.name, count, PROMPTS])
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", _JAVASCRIPT],
        env=os.environ | {"ECOSYSTEM": request},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


RUNTIMES = {
    "onnxruntime-genai": with_genai,
    "optimum": with_optimum,
    "transformers.js": with_transformers_js,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runtime", choices=RUNTIMES, required=True)
    parser.add_argument("--modules", type=Path, help="where npm has installed transformers.js")
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()

    answers = RUNTIMES[arguments.runtime](arguments.bundle, arguments.tokens, arguments.modules)
    engine = Engine(Bundle.open(arguments.bundle))
    tokenizer = Tokenizer(engine.bundle)
    results = []
    for prompt, theirs in zip(PROMPTS, answers, strict=True):
        ids = tokenizer.encode(prompt)
        engine.rewind(0)
        logits = engine.prefill(ids)
        parts_at, margin = None, 0.0
        for number, token in enumerate(theirs[len(ids) :]):
            if token != logits.argmax():
                parts_at, margin = number, float(logits.max() - logits[token])
                break
            logits = engine.decode(token)
        results.append(
            {
                "prompt": prompt,
                "same_prompt_ids": theirs[: len(ids)] == ids,
                "same_answer": parts_at is None,
                "parts_at": parts_at,
                "by": margin,
                "text": tokenizer.decode(theirs[len(ids) :]),
            }
        )
    recipe = engine.bundle.recipe
    print(json.dumps({"runtime": arguments.runtime, "recipe": recipe, "prompts": results}))


if __name__ == "__main__":
    main()
