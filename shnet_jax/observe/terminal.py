"""Safe standard output: neither an unencodable character nor a closed pipe ends a command."""

from __future__ import annotations

import codecs
import io
import os
import sys

_PLAIN = str.maketrans({"→": "->", "±": "+-", "≥": ">=", "≤": "<=", "×": "x", "–": "-", "“": '"', "”": '"'})
_ERRORS = "shnet_jax.plain"


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Codec error handler: symbols of our tables become ASCII, everything else an escape such as \\u2713."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


class _Output(io.TextIOWrapper):
    """Stream on the buffer of another one; it discards its output once the reader is gone."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        # The buffer keeps what it could not write, and tries it again at the end of the process.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.fileno())
        os.close(nothing)


def make_output_safe() -> None:
    """Makes printing safe on any terminal or pipe; every command calls this first.

    A character that the encoding of stdout lacks (PYTHONIOENCODING=ascii, a Windows code page) is replaced. When the
    reader of stdout or stderr leaves (`| head`), the command goes on: its results are in files.
    """
    codecs.register_error(_ERRORS, _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # not a notebook's, nor one that is safe already
            stream.flush()
            safe = _Output(
                stream.buffer,
                stream.encoding,
                _ERRORS,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, safe)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)
