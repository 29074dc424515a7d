"""Files that are whole or not there at all, folders with one writer, and reading that cannot be made to hang."""

import errno
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

MAX_BYTES = 1 << 28  # what a file may have that is read whole
TEMPORARY = re.compile(r"\..+\.\d+\.tmp", re.DOTALL)


@contextmanager
def atomic_open(path: Path, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open `path` for writing bytes; it appears, whole, when the block ends, and not at all if the block fails.

    durable  wait until it is on the disk, so that not even a power failure leaves less than the old file or the new
    An OSError names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # of a full disk the system names no file, of the others the temporary one
            advice = "; free some space, what was saved before is intact" if error.errno == errno.ENOSPC else ""
            raise OSError(error.errno, f"{error.strerror}{advice}", str(path)) from None
        raise


@contextmanager
def exclusive(folder: Path, wait: bool = False, below: tuple[str, ...] = ()) -> Iterator[None]:
    """Be the only process that writes into `folder`, and clear what killed ones left unfinished there.

    wait   for another process to end; otherwise a ValueError says that there is one
    below  patterns of the folders in it that are written, too
    The lock ends with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:  # a file system without locks
        pass
    except Timeout:
        if not wait:
            raise ValueError(
                f"{folder}: expected to be alone, found another process at work in it; wait, or choose another folder"
            ) from None
        print(f"{folder}: waiting for another process at work in it", file=sys.stderr)
        lock.acquire()
    try:
        _clear(folder, below)
        yield
        _clear(folder, below)  # of workers that were killed meanwhile
    finally:
        lock.release()


def _clear(folder: Path, below: tuple[str, ...]) -> None:
    for place in (folder, *(place for pattern in below for place in folder.glob(pattern))):
        for path in place.glob(".*.tmp"):
            if TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """The content of a file of at most `most` bytes. Raises ValueError for anything but a regular file, or a larger."""
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: expected a regular file, found a folder, a pipe or a device")
    if found.st_size > most:
        raise ValueError(f"{path}: expected at most {most} bytes, found {found.st_size}")
    return Path(path).read_bytes()


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically and durably."""
    with atomic_open(path, durable=True) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises ValueError, naming the file, when it holds anything else."""
    try:
        value = json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: expected a JSON object, found {reason}; restore it or write it anew") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}; restore it or write it anew")
    return value
