"""The file in a form that a browser sends, multipart/form-data (RFC 7578), within bounds on its parts."""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_PARTS = 16
MAX_HEAD = 4096  # bytes of the headers of a part
MAX_NAME = 200  # letters of the file's name

_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))\s*(?:;|$)', re.IGNORECASE)  # RFC 2046: 70
_DISPOSITION = re.compile(r"^content-disposition:\s*form-data(;.*)$", re.IGNORECASE | re.MULTILINE)
_PARAMETER = re.compile(r';[ \t]*(name|filename)=(?:"([^"]*)"|([^\s;"]*))', re.IGNORECASE)


def file_in(content_type: str, body: bytes, field: str) -> tuple[bytes, str]:
    """The content of the first part of a form that is called `field`, and the name of its file, or `field` without one.

    Raises ValueError for a body that is no form, ends too early, or has no such part among its first MAX_PARTS.
    """
    fault = f'{field}: expected a form with a file in the field "{field}", found none'
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        raise ValueError(f"{fault}: its content type has no boundary of 1 to 70 letters")
    try:
        for head, content in _parts(body, b"\r\n--" + (boundary[1] or boundary[2]).encode("latin-1")):
            names = _names(head)
            if names.get("name") == field:
                return content, (names.get("filename") or field)[:MAX_NAME]
    except ValueError as error:
        raise ValueError(f"{fault}: {error}") from None
    raise ValueError(fault)


def _parts(body: bytes, delimiter: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Headers and content of each part. Raises ValueError for one that does not end, and for too many."""
    first = body.startswith(delimiter[2:])  # nothing before it, not even the end of a line
    at = -2 if first else body.find(delimiter)
    if at < 0 and not first:
        raise ValueError("its boundary is not in the body")
    for count in range(MAX_PARTS + 1):
        at += len(delimiter)
        if body.startswith(b"--", at):
            return
        if count == MAX_PARTS:
            raise ValueError(f"expected at most {MAX_PARTS} parts")
        head_end = body.find(b"\r\n\r\n", at, at + MAX_HEAD)
        if head_end < 0:
            raise ValueError(f"part {count + 1}: expected headers of at most {MAX_HEAD} bytes")
        end = body.find(delimiter, head_end + 2)
        if end < 0:
            raise ValueError(f"part {count + 1} has no end")
        yield body[at:head_end], body[head_end + 4 : end]
        at = end


def _names(head: bytes) -> dict[str, str]:
    """The parameters name and filename in the headers of a part."""
    line = _DISPOSITION.search(head.decode("utf-8", "replace"))
    matches = _PARAMETER.finditer(line[1]) if line else ()
    return {match[1].lower(): match[2] if match[3] is None else match[3] for match in matches}
