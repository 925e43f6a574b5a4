"""Make a virtual environment and install the project into it, showing what is being fetched.

Usage: python make_venv.py FOLDER EXTRAS        (standard library only)
"""

import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

_TELLING = re.compile(r"\s*(Downloading|Building|Installing collected|Successfully)")


def main(folder: str, extras: str) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what tells people
        print(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    start = time.monotonic()
    python = Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        print(f"making the environment {folder}", flush=True)
        venv.create(folder, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "-e", f".[{extras}]"]
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert pip.stdout is not None
    lines = []
    for line in pip.stdout:
        lines.append(line)
        if _TELLING.match(line):
            if "Installing collected" in line:
                line = f"Installing {line.count(',') + 1} packages; takes a minute or two"
            print(f"[{time.monotonic() - start:4.0f} s] {line.strip()[:90]}", flush=True)
    if pip.wait():
        sys.stderr.writelines(lines[-30:])
        print("\npip failed; what it said last stands above", file=sys.stderr)
    return pip.returncode


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
