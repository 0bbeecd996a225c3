"""Arrays that an unfinished run leaves, with a mark of all that they depend on."""

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

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, mark=json.dumps(mark), **arrays)

    replace(path, save)


def read(path: Path, mark: dict[str, Any], *names: str) -> list[np.ndarray] | None:
    """The named arrays; None, said in the log, where the file is broken or of another mark."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            found, before = [file[name] for name in names], json.loads(str(file["mark"]))
        other = unlike(before, json.loads(json.dumps(mark)))
    except (OSError, ValueError, KeyError, EOFError, AttributeError, BadZipFile):
        log.info("%s: not whole, or of an older version; starting afresh", path)
        return None
    if other:
        log.info("%s: of another run (other %s); starting afresh", path, listed(other))
        return None
    return found
