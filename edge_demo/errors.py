"""What can go wrong on the device, as one sentence each."""


class EdgeError(Exception):
    """Something failed for a reason worth one sentence; commands end with exit status 1.

    Args:
        message: the sentence; line breaks in it, which other libraries make, become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class RequestError(EdgeError):
    """The request itself cannot be served as it was made; commands end with exit status 2."""


class BundleError(RequestError):
    """A bundle is missing, incomplete, changed, or made for another version."""
