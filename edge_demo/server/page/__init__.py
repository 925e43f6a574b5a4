"""The page at `/`: one HTML file without a build, which works offline."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files


def page() -> tuple[bytes, str]:
    """The page, and the `Content-Security-Policy` under which its own script and style run alone.

    W3C, "Content Security Policy Level 3": a source may be given by its hash.
    """
    html = (files(__name__) / "index.html").read_bytes()
    script, style = (_source(html, name) for name in (b"script", b"style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _source(html: bytes, name: bytes) -> str:
    found = re.search(b"<%s>(.*?)</%s>" % (name, name), html, re.DOTALL)
    assert found is not None
    digest = hashlib.sha256(found[1]).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
