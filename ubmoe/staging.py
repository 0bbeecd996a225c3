"""What a run writes lies beside its place until the run is whole, and is moved there in one go.

A program has one folder of its own in its output directory, `.unfinished-<program>`. When all that
the run owes is in it, the folder is renamed to `.finished-<program>`: that is the moment from which
the run counts. Its contents are then moved, and whoever comes next makes up for the moves that a
killed process did not come to.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ubmoe.config import UserError

FINISHED = ".finished-"


def unfinished_of(directory: Path, program: str) -> Path:
    """Where a program's run writes until it is whole."""
    return directory / f".unfinished-{program}"


@contextmanager
def staging(directory: Path, program: str) -> Iterator[Path]:
    """The folder of what the program's run writes, locked, empty and not yet made.

    What killed runs have left is put in order first. Raises UserError where the program already
    runs in the directory.
    """
    complete_moves(directory)
    folder = unfinished_of(directory, program)
    with locked(directory, program):
        shutil.rmtree(folder, ignore_errors=True)
        _remove_halves(directory)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_halves(directory: Path) -> None:
    """Of models that an older version was killed over, as it wrote or replaced them."""
    for folder in [*directory.glob(".*.old"), *directory.glob(".*.new")]:
        place = directory / folder.name[1:].rpartition(".")[0]
        if folder.suffix == ".old" and not place.exists():
            folder.rename(place)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(directory: Path, program: str) -> Iterator[None]:
    """Hold the program's lock; that of a killed process holds nobody up.

    Raises UserError where another process holds it.
    """
    path = directory / f".{program.replace(' ', '-')}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
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
    round.
    """
    for each in folder.iterdir():
        target = folder.parent / each.name
        if target.exists() and target.is_dir() != each.is_dir():
            code = errno.EISDIR if target.is_dir() else errno.ENOTDIR
            raise OSError(code, os.strerror(code), str(target))
    finished = folder.with_name(folder.name.replace(".unfinished-", FINISHED))
    folder.rename(finished)
    _move_all(finished)


def complete_moves(directory: Path) -> None:
    """Move what killed processes had finished, and not yet moved."""
    for finished in directory.glob(f"{FINISHED}*"):
        with suppress(UserError), locked(directory, finished.name.removeprefix(FINISHED)):
            _move_all(finished)  # no other process is doing it


def _move_all(finished: Path) -> None:
    """Folders first, the result last. Wherever it is cut off, it can be done again."""
    if not finished.is_dir():  # another process has done it
        return
    removed = finished / ".removed"
    shutil.rmtree(removed, ignore_errors=True)
    for each in sorted(finished.iterdir(), key=_order):
        target = finished.parent / each.name
        if each.is_dir() and target.exists():
            removed.mkdir(exist_ok=True)
            target.rename(removed / each.name)
        each.rename(target)
    shutil.rmtree(removed, ignore_errors=True)
    finished.rmdir()


def _order(path: Path) -> tuple[bool, bool, str]:
    return not path.is_dir(), path.suffix == ".json", path.name
