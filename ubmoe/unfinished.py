"""Partial results of an unfinished run, in a file with the resume key of all they depend on.

The one cache that runs go on from: sums of dependence, rows of interventions, word vectors,
probing reports and STS scores of whole tasks. Checkpoints of a training are in
`training.checkpoints`.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
SAVE_EVERY = 30.0  # seconds
KEY = "resume_key"


class Unfinished:
    """Arrays by name, replaced whole; those of another key are not taken.

    path: None keeps nothing, for a caller that does not go on from anything.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path, self.key = path, key
        self.saved = time.monotonic()

    def save(self, **arrays: Any) -> None:
        """Replace the file. Raises UserError for one that is not ours."""
        self.saved = time.monotonic()
        if self.path is None:
            return
        check(self.path)
        kept: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                seals: dict[str, Any] = {KEY: json.dumps(self.key), "sha256": _digest(kept)}
                np.savez(file, **seals, **kept)

        replace(self.path, write)

    def load(self, *names: str) -> list[np.ndarray] | None:
        """The named arrays; None, said in the log, for a file that is broken or of another key."""
        if self.path is None or not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                every = {name: file[name] for name in file.files}
            before, digest = json.loads(str(every.pop(KEY))), str(every.pop("sha256"))
            arrays = [every[name] for name in names]
            if digest != _digest(every):
                raise ValueError("other numbers")
            other = unlike(before, json.loads(json.dumps(self.key)))
        except WRONG:
            log.info("%s: not whole, or of an older version; starting afresh", self.path)
            return None
        if other:
            log.info("%s: of another run (other %s); starting afresh", self.path, listed(other))
            return None
        return arrays

    def remove(self) -> None:
        """Remove the file, if it is ours."""
        if self.path is not None:
            remove(self.path)

    def is_due(self) -> bool:
        """Whether the last saving is so long ago that it is time for the next."""
        return time.monotonic() - self.saved > SAVE_EVERY

    @contextmanager
    def kept_on_interrupt(self, save: Callable[[], None]) -> Iterator[None]:
        """Save what is complete on Ctrl-C."""
        try:
            yield
        except KeyboardInterrupt:
            save()
            raise


def check(path: Path) -> None:
    """Raises UserError where something that is not ours is in the place of a file."""
    if os.path.lexists(path) and not is_ours(path):
        raise owned.refused(path)


def remove(path: Path) -> None:
    """Remove a file, if it is ours."""
    if is_ours(path):
        path.unlink()


def is_ours(path: Path) -> bool:
    """Whether a file was written here, or is broken; no link, and no array of somebody else's."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        return f"{KEY}.npy" in ZipFile(path).namelist()
    except BadZipFile:
        return True


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """sha256 of names, shapes, dtypes and numbers."""
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        digest.update(f"{name} {value.dtype} {value.shape} ".encode() + value.tobytes())
    return digest.hexdigest()
