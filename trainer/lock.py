"""Files that one process has at a time: a lock ends with its process, whatever ends that."""

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

LEASE = 180  # seconds that a lock may outlive its machine
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def lock(file: Path, say: Callable[[str], None] | None = None) -> int | None:
    """Lock a file, which is made if need be, until the descriptor is closed; None if its filesystem has no locks.

    With `say`, in a job of SLURM, another process is waited for, and that is said: on a network file system it may be
    one of a machine that is gone, which keeps its lock for some minutes. But not when torchrun starts the ranks again.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be written.
    """
    if "SLURM_JOB_ID" not in os.environ or int(os.getenv("TORCHELASTIC_RESTART_COUNT", "0")):
        say = None
    descriptor, left = os.open(file, os.O_RDWR | os.O_CREAT, 0o644), LEASE
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if say is None or not left:
                    raise
            if left == LEASE:
                say(f"another process has {file}; waiting up to {LEASE} s, should it be one of a machine that is gone")
            left -= 1
            time.sleep(1.0)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError) and error.errno in _NO_LOCKS:
            return None
        raise
