"""`python -m edge_demo`, the same as `edge-demo`."""

import sys

from edge_demo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
