"""Arrays that an unfinished run leaves, with a mark of all that they depend on."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np

from ubmoe import owned
from ubmoe.config import listed, unlike
from ubmoe.files import replace

log = logging.getLogger(__name__)
# What a file of any other content raises.
WRONG = (OSError, EOFError, ValueError, LookupError, AttributeError, RecursionError, BadZipFile)


def is_ours(path: Path) -> bool:
    """Whether a file was written here, or is broken; no link, and no array of somebody else's."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        return "mark.npy" in ZipFile(path).namelist()
    except BadZipFile:
        return True


def write(path: Path, mark: dict[str, Any], **arrays: Any) -> None:
    """Replace the file whole. Raises UserError for one that is not ours."""
    if os.path.lexists(path) and not is_ours(path):
        raise owned.refused(path)

    held: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, mark=json.dumps(mark), sha256=_digest(held), **held)

    replace(path, save)


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """Of names, shapes, dtypes and numbers."""
    found = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        found.update(f"{name} {value.dtype} {value.shape} ".encode() + value.tobytes())
    return found.hexdigest()


def read(path: Path, mark: dict[str, Any], *names: str) -> list[np.ndarray] | None:
    """The named arrays; None, said in the log, where the file is broken or of another mark."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            every = {name: file[name] for name in file.files}
        before, digest = json.loads(str(every.pop("mark"))), str(every.pop("sha256"))
        found = [every[name] for name in names]
        if digest != _digest(every):
            raise ValueError("other numbers")
        other = unlike(before, json.loads(json.dumps(mark)))
    except WRONG:
        log.info("%s: not whole, or of an older version; starting afresh", path)
        return None
    if other:
        log.info("%s: of another run (other %s); starting afresh", path, listed(other))
        return None
    return found
