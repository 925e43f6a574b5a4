"""The errors of `export`; each message says what is wrong and what to do."""


class ExportError(Exception):
    """The export failed; the command ends with exit status 1."""


class ExportRequestError(ExportError):
    """The request is not valid; the command ends with exit status 2."""
