"""Locks on files between processes (flock), which the kernel ends with the process, and file systems without them."""

from __future__ import annotations

import errno
import fcntl
from typing import IO, Any

_NONE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def lock(file: IO[Any], how: int) -> bool:
    """Locks an open file; False on a file system without locks. how: flags of `fcntl.flock`.

    The lock ends when the file is closed. Raises BlockingIOError where another holds it and LOCK_NB is in `how`.
    """
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in _NONE:
            raise
        return False
    return True
