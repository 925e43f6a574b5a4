"""Export an instruction-tuned model, then ask its bundle a question with `edge-demo`.

    python examples/export_and_chat.py google/gemma-3-1b-it my-bundle "Why is the sky blue?"

The second half is all that a device runs. It needs no Keras.
"""

import argparse
import subprocess
import sys

from export import export_onnx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a .gguf file, a Hugging Face folder or name")
    parser.add_argument("out", help="the bundle's folder, which must not exist")
    parser.add_argument("question")
    parser.add_argument("--recipe", default="int8")
    arguments = parser.parse_args()

    result = export_onnx(arguments.model, arguments.out, arguments.recipe)
    print(f"wrote {result.path}: {result.num_bytes / 1e6:,.0f} MB", flush=True)

    command = [sys.executable, "-m", "edge_demo", "chat", arguments.out]
    command += ["--prompt", arguments.question, "--max-tokens", "64", "--seed", "1"]
    sys.exit(subprocess.run(command, stdin=subprocess.DEVNULL).returncode)


if __name__ == "__main__":
    main()
