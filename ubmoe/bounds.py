"""Limits for untrusted files: their kind and size, and the time and memory of reading them.

Nothing of the package is imported here: every reader, the configuration's too, reads through it.
"""

import errno
import json
import os
import resource
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SMALL = 2**20  # bytes of what people write by hand: configurations, templates, tasks
METADATA = 2**28  # of a model's JSON; the largest tokenizers have 40 MB
MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
DATA = min(2**32, MACHINE // 16)  # of a data file: read whole, its rows are as many times larger
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with a home written out; as it stands where nobody is called so, as in a shell."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def regular(path: str | os.PathLike[str], most: int | None = None) -> Path:
    """The path of a regular file of at most `most` bytes. Raises OSError for any other.

    Opening a pipe waits for a writer, and a device has no end.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, no file", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is a pipe or a device, no file", str(path))
    if most is not None and status.st_size > most:
        raise _too_large(path, status.st_size, most)
    return Path(path)


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """A regular file's bytes. Raises OSError; some files are longer than they say."""
    with regular(path, most).open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise _too_large(path, len(content), most)
    return content


def read_text(path: str | os.PathLike[str], most: int = SMALL) -> str:
    """A regular file's text. Raises OSError, and UnicodeDecodeError where it is not UTF-8."""
    return read_bytes(path, most).decode("utf-8").replace("\r\n", "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """A regular file's JSON. Raises OSError, and ValueError where it is none, or nested too deeply.

    The one reader of JSON that somebody else may have written.
    """
    try:
        return json.loads(read_text(path, METADATA))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _too_large(path: str | os.PathLike[str], size: int, most: int) -> OSError:
    words = f"is too large: {size / 2**20:,.1f} MiB, at most {most / 2**20:,.0f} are read"
    return OSError(errno.EFBIG, words, str(path))


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An error of the disk inside that names no file, as those of writing, names this one.

    As its `filename`, which the libraries' own errors get too: they say a full disk as they like.
    """
    try:
        yield
    except Exception as error:
        of_disk = not isinstance(error, OSError) or error.errno in DISK
        if of_disk and getattr(error, "filename", None) is None:
            error.filename = str(path)  # type: ignore[attr-defined]
        raise


@contextmanager
def limited(seconds: float, memory: int) -> Iterator[None]:
    """Inside, Python code has so many seconds and so many bytes more than there are now.

    Raises TimeoutError, in the main thread alone, where signals arrive; and MemoryError, where the
    system says how much a process has.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        wanted = pages * resource.getpagesize() + memory
        most = wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)
    except OSError:
        most = soft
    in_time = threading.current_thread() is threading.main_thread()
    earlier = signal.signal(signal.SIGALRM, _out_of_time) if in_time else None
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    timer = (0.0, 0.0)
    try:
        if in_time:
            timer = signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    except _OutOfTime as error:
        raise TimeoutError(f"more than {seconds:g} s") from error
    finally:
        if in_time:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, earlier or signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, *timer)  # of whoever has us inside one
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _OutOfTime(BaseException):  # noqa: N818  # which no library takes for a failure of its own
    pass


def _out_of_time(*_: object) -> None:
    raise _OutOfTime
