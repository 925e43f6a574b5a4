"""`python -m export`: the command `export-onnx`."""

import sys

from export.cli import main

if __name__ == "__main__":
    sys.exit(main())
