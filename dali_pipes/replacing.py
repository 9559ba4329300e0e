"""Files that are whole at any instant: written beside, then renamed."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PART = ".part"  # ending of a file that is being written

_UMASK = os.umask(0)  # can only be read by setting it: once, before there are threads
os.umask(_UMASK)


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A private file to write into (and to read back), which becomes `file` if the block ends without an error.

    `file` is either the old or the new one at any instant, also after a power cut or where several processes write it.
    The temporary file is nobody else's to read or to swap: it is made anew, for this user alone, and is gone after an
    error.
    """
    descriptor, part = tempfile.mkstemp(prefix=f"{file.name}.", suffix=PART, dir=file.parent)
    try:
        with open(descriptor, "w+b") as stream:
            yield stream
            stream.flush()
            os.fchmod(descriptor, 0o666 & ~_UMASK)
            os.fsync(descriptor)
        os.replace(part, file)
        _sync_folder(file.parent)
    except BaseException as error:
        with suppress(OSError):  # what went wrong before is what to report
            os.unlink(part)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # a full disk, in the words of torch's zip writer
        raise


def write_atomically(file: Path, content: bytes) -> None:
    """Write so that `file` is either the old or the new one at any instant, also after a power cut."""
    with replacing(file) as stream:
        stream.write(content)


def _sync_folder(folder: Path) -> None:
    """Make a rename last; some network file systems know no such thing, and do without."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
