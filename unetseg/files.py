"""Files that are complete or absent, folders with one writer at a time, and errors in one line."""

import errno
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

MAX_BYTES = 1 << 28  # largest file that is read whole
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO)


class UserError(ValueError):
    """Something we were given is wrong; the message is complete without a traceback."""


class Busy(UserError):
    """Another process has the lock."""


class FileError(OSError, UserError):
    """A file could not be read or written; the message names it."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def file_error(error: OSError, path: Path | str) -> FileError:
    """The same error, naming `path`."""
    advice = "; free some space (what was saved before is intact)" if error.errno == errno.ENOSPC else ""
    return FileError(error.errno, f"{error.strerror or error}{advice}", str(path))


@contextmanager
def atomic_open(path: Path, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open `path` for writing bytes; the file appears complete when the block ends, and not at all if the block fails.

    durable  flush to disk first, so that a power failure leaves either the old file or the new one
    Raises FileError naming `path`; its folder must exist.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:  # never follows a link
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise file_error(error, path) from None
        raise


def make_folder(path: Path) -> Path:
    """Create a folder and its parents. Raises FileError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, path) from None
    return path


@contextmanager
def exclusive(folder: Path, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes into `folder`, and remove temporary files that killed processes left there.

    wait  wait for another writer to finish; otherwise raise Busy when there is one
    """
    lock = FileLock(make_folder(folder) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise Busy(f"{folder}: another process is writing here; wait for it, or use another folder") from None
        print(f"{folder}: waiting for another process that is writing here", file=sys.stderr)
        lock.acquire()
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise file_error(error, folder) from None
        print(f"warning: {folder}: this file system has no locks; start one process at a time here", file=sys.stderr)
    try:
        for path in folder.glob(".*.tmp"):
            if TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """Content of a regular file of at most `most` bytes. Raises UserError naming the file."""
    try:
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: expected a regular file, found a folder, a pipe or a device")
        if found.st_size > most:
            raise UserError(f"{path}: expected at most {most} bytes, found {found.st_size}")
        return Path(path).read_bytes()
    except OSError as error:
        raise file_error(error, path) from None


def write_bytes(path: Path, content: bytes, durable: bool = False) -> None:
    """Write a file, as `atomic_open` does."""
    with atomic_open(path, durable) as file:
        file.write(content)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically and durably."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode(), durable=True)


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises UserError naming the file when it holds anything else."""
    content = read_bytes(path)
    try:
        value = json.loads(content.decode())
        if not isinstance(value, dict):
            raise ValueError(type(value).__name__)
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON object, found {error}; restore the file or write it again") from None
