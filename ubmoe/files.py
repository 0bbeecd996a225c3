"""Files and folders that are written whole or not at all."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ubmoe import owned
from ubmoe.bounds import naming
from ubmoe.config import UserError


def make_writable(directory: Path) -> list[Path]:
    """Make the directory where it is missing; returns the folders made, deepest first."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"output_dir: {directory} cannot be written ({reason}); expected a folder of yours"
        ) from error
    return missing


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and rename it: nobody reads half. Raises OSError."""
    replace_all({path: write})


def replace_all(writes: dict[Path, Callable[[Path], object]]) -> None:
    """Like `replace`, for files that belong together: none gives way before all are written."""
    unique = f"ubmoe-{os.getpid()}-{secrets.token_hex(4)}"  # nobody's file is called so
    temporary = {path: path.with_name(f".{path.name}.{unique}") for path in writes}
    try:
        for path, write in writes.items():
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            with naming(path):
                write(temporary[path])
        for path in writes:
            temporary[path].replace(path)
    finally:
        for remains in temporary.values():
            remains.unlink(missing_ok=True)


def replace_directory(path: Path, write: Callable[[Path], object]) -> None:
    """Like `replace`, for a folder: the old one gives way only to a whole new one.

    Raises UserError for an old one that is not ours.
    """
    temporary, old = (path.with_name(f".{path.name}.ubmoe-{word}") for word in ("new", "old"))
    owned.check(path, temporary, old)
    if old.exists() and not path.exists():  # of a process that was killed between the renames
        old.rename(path)
    owned.remove(temporary, old)
    try:
        owned.claim(temporary, "*")
        with naming(path):
            write(temporary)
        owned.name_all(temporary)
        make_readable(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        for remains in (temporary, old):
            shutil.rmtree(remains, ignore_errors=True)


def make_readable(folder: Path) -> None:
    """Give a folder's files the rights of any new file; some libraries write for one user."""
    os.umask(mask := os.umask(0))  # it can only be read by setting it
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def digest_of_file(path: Path) -> str:
    """sha256 of its bytes; 1.3 s of one core a GB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Atomic; a NaN is an error, since it is no JSON and no result."""
    replace(path, partial(write_text, text=json_text(record)))


def json_text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of glyphs that the font lacks
        figure.savefig(path, format="png", metadata=owned.CREATOR)
