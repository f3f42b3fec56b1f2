"""The error of everything that writes or reads data sets."""

from __future__ import annotations


class DataError(ValueError):
    """A data set, or a file that should become one, is not as it has to be.

    file, field: what it is about, for lists of errors; the message says so too. None where it is about several.
    """

    def __init__(self, message: str, *, file: str | None = None, field: str | None = None):
        super().__init__(message)
        self.file, self.field = file, field
