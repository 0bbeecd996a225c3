"""Arrays that an unfinished run leaves, with a mark of all that they depend on."""

import json
import logging
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ubmoe.config import listed, unlike
from ubmoe.files import replace

log = logging.getLogger(__name__)


def write(path: Path, mark: dict[str, Any], **arrays: Any) -> None:
    """Replace the file whole."""

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
