"""A run's files lie beside their place until it is complete, and are then moved in one go.

A program has one folder of its own in its output directory, `.unfinished-<program>`. When all that
the run owes is in it, the folder is renamed to `.finished-<program>`: that is the moment from which
the run counts. Its contents are then moved, and whoever comes next makes up for the moves that a
killed process did not come to. Nothing that is not ours gives way to it.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ubmoe import owned
from ubmoe.config import UserError

FINISHED, REMOVED = ".finished-", ".removed"


class Busy(UserError):  # noqa: N818  # it is said as any other
    """Another process holds the program's lock."""


def unfinished_of(directory: Path, program: str) -> Path:
    """Where a program's run writes until it is whole."""
    return directory / f".unfinished-{program}"


@contextmanager
def staging(directory: Path, program: str) -> Iterator[Path]:
    """The folder of what the program's run writes, locked and empty.

    What killed runs have left is put in order first. Raises UserError where the program already
    runs in the directory, or something that is not ours is called as its folder.
    """
    complete_moves(directory)
    folder = unfinished_of(directory, program)
    with locked(directory, program):
        owned.check(_finished_of(folder))
        owned.remove(folder)
        owned.claim(folder, "*")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(directory: Path, program: str) -> Iterator[None]:
    """Hold the program's lock; that of a killed process holds nobody up.

    Raises UserError where another process holds it, or it is a file of somebody's.
    """
    path = directory / f".{program.replace(' ', '-')}.lock"
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or path.stat().st_size):
        raise owned.refused(path)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise Busy(
            f"output_dir: {program} already runs in {directory}; expected another folder, or wait "
            "for its end"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # where an open file cannot be removed
            path.unlink()
        lock.release()


def move_into_place(folder: Path) -> None:
    """Move all that `staging` gave to the output directory: all of it, or nothing.

    Raises OSError before anything is moved for a folder where a file is to be, and the other way
    round; UserError for what would give way and is not ours.
    """
    finished = _finished_of(folder)
    owned.check(finished)
    for file in _moved(folder):
        target = folder.parent / file.name
        if target.exists() and target.is_dir() != file.is_dir():
            code = errno.EISDIR if target.is_dir() else errno.ENOTDIR
            raise OSError(code, os.strerror(code), str(target))
        owned.check(target)
        if file.is_dir():
            owned.name_all(file)
    folder.rename(finished)
    _move_all(finished)


def _finished_of(folder: Path) -> Path:
    return folder.with_name(folder.name.replace(".unfinished-", FINISHED))


def complete_moves(directory: Path) -> None:
    """Move what killed processes had finished, and not yet moved.

    Raises UserError where something that is not ours has come in the way since.
    """
    for finished in directory.glob(f"{FINISHED}*"):
        if finished.is_symlink() or owned.claimed(finished) is None:
            continue
        with suppress(Busy), locked(directory, finished.name.removeprefix(FINISHED)):
            _move_all(finished)  # no other process is doing it


def _move_all(finished: Path) -> None:
    """Folders first, the result last. Wherever it is cut off, it can be done again."""
    if not finished.is_dir():  # another process has done it
        return
    removed = finished / REMOVED
    shutil.rmtree(removed, ignore_errors=True)
    for file in sorted(_moved(finished), key=_order):
        target = finished.parent / file.name
        owned.check(target)
        if file.is_dir() and target.exists():
            removed.mkdir(exist_ok=True)
            target.rename(removed / file.name)
        file.rename(target)
    shutil.rmtree(finished, ignore_errors=True)


def _moved(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.name not in (owned.MARK, REMOVED)]


def _order(path: Path) -> tuple[bool, bool, str]:
    return not path.is_dir(), path.suffix == ".json", path.name
