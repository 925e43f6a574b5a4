"""`edge-demo install-service`: a systemd unit that keeps `edge-demo serve` running."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from edge_demo.cli import options
from edge_demo.errors import EdgeError, RequestError, sentence

TEXT = "Write a systemd unit that serves a bundle from every start on."
_MOST_NAME = 64
_WATCHDOG_S = 180  # a piece of a long prompt takes many seconds on a small board


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `install-service` takes; its own options come before the bundle."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the folder that export-onnx wrote")
    parser.add_argument(
        "serve_options",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="options of `edge-demo serve`, behind the bundle",
    )
    parser.add_argument(
        "--name", default="edge-demo", help="name of the unit (default: %(default)s)"
    )
    parser.add_argument(
        "--memory-mb", type=options.positive, metavar="MB", help="most memory (default: no limit)"
    )
    parser.add_argument("--print", action="store_true", help="print the unit, write nothing")
    options.add_debug(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the unit, and say what it wrote and what comes next."""
    name = arguments.name
    if not name.replace("-", "").replace("_", "").isalnum() or len(name) > _MOST_NAME:
        raise RequestError(f"{name[:80]!r} cannot be a unit's name; use letters, digits, - and _")
    bundle = Path(arguments.bundle).resolve()
    if not (bundle / "bundle.json").is_file():
        raise RequestError(f"{bundle} is not a bundle: it has no bundle.json")
    _check_options(arguments.serve_options, bundle)
    system = os.geteuid() == 0
    account = _owner(bundle) if system else None
    unit = unit_text(bundle, arguments.serve_options, arguments.memory_mb, account)
    if arguments.print:
        sys.stdout.write(unit)
        return 0
    path = _folder(system) / f"{name}.service"
    from edge_demo.durable import write_whole

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (unit.encode(),))
    except OSError as error:
        raise EdgeError(f"the unit {path} cannot be written: {sentence(error)}") from None
    control = "systemctl" if system else "systemctl --user"
    print(f"Wrote {path}. It begins with:")
    print(f"  {control} daemon-reload && {control} enable --now {name}")
    print(f"What it says: journalctl {'' if system else '--user '}-u {name}")
    if not system:
        print("To begin before you log in: sudo loginctl enable-linger $USER")
    return 0


def _check_options(given: list[str], bundle: Path) -> None:
    """Refuse what `edge-demo serve` would refuse at every start."""
    from edge_demo.argument_parser import ArgumentParser
    from edge_demo.cli import serve

    parser = ArgumentParser(prog="edge-demo serve")
    serve.add_options(parser)
    parser.parse_args([str(bundle), *given])


def _folder(system: bool) -> Path:
    if system:
        return Path("/etc/systemd/system")
    config = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(config) / "systemd" / "user"


def _owner(bundle: Path) -> str:
    """Who can read a bundle for certain: a home folder may be closed to others."""
    import pwd

    number = bundle.stat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # a user that this system does not know
        return str(number)


def unit_text(bundle: Path, given: list[str], memory_mb: int | None, account: str | None) -> str:
    """The unit's file.

    Args:
        bundle: to serve, an absolute path.
        given: options of `edge-demo serve`.
        memory_mb: the most memory; `None` for no limit.
        account: the user that runs a unit of the system; for `root`, systemd makes one. `None`
            for a unit of one's own.

    Raises:
        RequestError: an argument has a line break, which a unit cannot hold.
    """
    command = [sys.executable, "-m", "edge_demo", "serve", str(bundle), *given]
    lines = [
        "# Written by edge-demo install-service: " + shlex.join(["serve", str(bundle), *given]),
        "[Unit]",
        "Description=Gemma on this device (edge-demo serve)",
        "After=network.target",
        "# Five failures in five minutes are enough; then it needs a person.",
        "StartLimitIntervalSec=300",
        "StartLimitBurst=5",
        "",
        "[Service]",
        "Type=notify",
        f"ExecStart={' '.join(map(_quoted, command))}",
        f"WorkingDirectory={str(Path.cwd()).replace('%', '%%')}",
        "Restart=on-failure",
        "RestartSec=5",
        f"WatchdogSec={_WATCHDOG_S}",
        "TimeoutStartSec=300",
        "TimeoutStopSec=60",
        "Nice=5",
        "OOMScoreAdjust=500",
    ]
    if memory_mb is not None:
        lines += [f"MemoryMax={memory_mb}M"]
    if account is not None:
        lines += ["DynamicUser=yes" if account == "root" else f"User={account}"]
        lines += ["CacheDirectory=edge-demo", "ProtectHome=read-only"]
        lines += ["Environment=XDG_CACHE_HOME=/var/cache/edge-demo", "ProtectSystem=strict"]
        lines += ["PrivateTmp=yes"]  # a user's units cannot have these everywhere
    lines += [
        "NoNewPrivileges=yes",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
        "",
        "[Install]",
        f"WantedBy={'default.target' if account is None else 'multi-user.target'}",
    ]
    if any("\n" in text or "\r" in text for text in (*command, str(Path.cwd()))):
        raise RequestError("an argument has a line break, which a unit cannot hold")
    return "\n".join([*lines, ""])


def _quoted(argument: str) -> str:
    """An argument as `systemd.service(5)` reads it back."""
    escaped = argument.replace("\\", "\\\\").replace('"', '\\"')
    escaped = escaped.replace("%", "%%").replace("$", "$$")
    plain = (
        escaped == argument and argument and not any(c.isspace() or c in "';#" for c in argument)
    )
    return argument if plain else f'"{escaped}"'
