"""Why an export did not happen, as one sentence each."""


class ExportError(Exception):
    """The export failed; the command ends with exit status 1."""


class ExportRequestError(ExportError):
    """The export was asked for in a way that cannot be met; exit status 2."""
