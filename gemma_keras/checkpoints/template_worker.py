"""Renders a chat template in a separate process, which `chat_templates` starts by this file's path.

A template is an untrusted program. jinja2's sandbox protects Python's internals, but does not limit
time or memory. This process limits both, and is killed after a timeout.

It reads a JSON object from stdin with `path` (for imports), `template`, `conversations` and
`names`. It writes a list: for each conversation its text, or `null` if the template rejects it.
"""

import json
import sys

_MOST_SECONDS, _MOST_BYTES, _LONGEST = 3, 1 << 30, 1 << 14


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows has none; the process is killed in time there too
        return
    resource.setrlimit(resource.RLIMIT_CPU, (_MOST_SECONDS, _MOST_SECONDS))
    for kind, most in ((resource.RLIMIT_AS, _MOST_BYTES), (resource.RLIMIT_FSIZE, 0)):
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # a system that does not have that limit
            continue


def _environment():
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, by which transformers marks what the model says: its text alone."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message=""):
        raise TemplateError(message)

    def to_json(value, indent=None, **kwargs):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    # As transformers sets it up.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: "2025-01-01"
    return environment


def _main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    sys.path[:] = request["path"]
    environment = _environment()
    _limit()
    template = environment.from_string(request["template"])
    texts = []
    for messages in request["conversations"]:
        try:
            text = template.render(
                messages=messages, add_generation_prompt=True, **request["names"]
            )
        except Exception:  # any error of a template
            text = None
        texts.append(text if text is None or len(text) <= _LONGEST else None)
    sys.stdout.buffer.write(json.dumps(texts).encode())


if __name__ == "__main__":
    _main()
