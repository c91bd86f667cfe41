"""Every error this package raises on purpose.

A message says what was given, what is allowed and what to do. `CaaLensError` catches all of them; each is
also the built-in error that a caller would expect (`ValueError`, `KeyError` or `ConnectionError`).
"""


class CaaLensError(Exception):
    """Base class of all errors raised by `caa_lens`."""


class InputError(CaaLensError, ValueError):
    """An argument, a file or a data set that cannot be used as given."""


class MissingError(CaaLensError, KeyError):
    """A name, a layer or a key that does not exist."""

    def __str__(self) -> str:  # KeyError would print the message in quotes
        return str(self.args[0]) if self.args else ""


class EndpointError(CaaLensError, ConnectionError):
    """A service that cannot be used: it refuses the key, does not answer, or answers with errors only."""


class CaaLensWarning(UserWarning):
    """Something that does not stop the work but changes what the result means."""
