"""The files that this program has made in a folder: they alone are ever replaced or removed.

A folder of ours holds a file `.ubmoe`, written first, which names what is ours in it. A result, a
resolved config and a picture say it themselves. No link is followed.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ubmoe.bounds import METADATA, SMALL, read_text
from ubmoe.config import UserError

MARK = ".ubmoe"
TITLE = "Made by ubmoe, which replaces or removes what is named here, and nothing else:"
CREATOR = {"Creator": "ubmoe"}  # in the pictures
RESULT, FETCHED = {"config", "environment", "seconds"}, {"fetched"}
RESOLVED = {"output_dir", "seed", "resume", "model", "results"}


def claim(folder: Path, *names: str) -> None:
    """Name what is about to be made in a folder, which is made where it is missing.

    names: of files and folders in it, or patterns of them. Raises UserError as `check_within`.
    """
    check_within(folder, *names)
    known = claimed(folder)
    new = [name for name in names if name not in (known or ())]
    if known is None or new:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, [*(known or ()), *new])


def name_all(folder: Path) -> None:
    """Claim all that is in a folder now, and nothing that anybody adds later."""
    every = (file.relative_to(folder).as_posix() for file in folder.rglob("*"))
    _write(folder, sorted(name for name in every if not name.endswith(MARK)))


def claimed(folder: Path) -> list[str] | None:
    """The names that a folder's mark holds; None without a mark of ours."""
    mark = folder / MARK
    try:
        title, *names = [] if mark.is_symlink() else read_text(mark, METADATA).splitlines()
    except (OSError, ValueError):
        return None
    return names if title == TITLE else None


def _write(folder: Path, names: Sequence[str]) -> None:
    """Whole, or not at all: half a mark would be nobody's."""
    temporary = folder / f"{MARK}-{os.getpid()}"
    temporary.write_text("\n".join([TITLE, *names, ""]), encoding="utf-8")
    temporary.replace(folder / MARK)


def remove(*paths: Path) -> None:
    """Remove folders that are all ours. Raises UserError, and then removes none."""
    check(*paths)
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def check(*paths: Path) -> None:
    """Raises UserError where a file or folder that would give way is not ours, or not all of it."""
    for path in paths:
        for stranger in strangers(path):
            raise refused(stranger)


def check_within(folder: Path, *names: str) -> None:
    """Raises UserError where a folder is a link, or holds something under such a name that its mark
    does not name, or names and is not all ours.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise refused(folder)
    known = claimed(folder) or ()
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _is_in(file.name, names) and not file.name.startswith(MARK):
            empty = file.is_dir() and not any(file.iterdir())
            if file.is_symlink() or not (empty or _is_in(file.name, known)):
                raise refused(file)
            if file.is_dir():
                check(file)


def refused(path: Path) -> UserError:
    return UserError(
        f"output_dir: {path} is in the way, and not known to be made by this version of ubmoe; "
        "move it, or take another output_dir"
    )


def strangers(path: Path) -> Iterator[Path]:
    """The files that are not ours, and would be lost with this file or folder."""
    if path.is_symlink() or not (path.is_dir() or is_ours(path)):
        if os.path.lexists(path):
            yield path
    elif path.is_dir():
        names = claimed(path)
        if names is not None:
            yield from _unnamed(path, names)
        elif any(path.iterdir()):
            yield path


def _unnamed(folder: Path, names: Sequence[str], below: str = "") -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        name = below + file.name
        if file.is_dir() and not file.is_symlink():
            if claimed(file) is None:
                yield from _unnamed(file, names, f"{name}/")
            else:
                yield from strangers(file) if _is_in(name, names) else [file]
        elif file.is_symlink() or not (file.name.startswith(MARK) or _is_in(name, names)):
            yield file


def _is_in(name: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in names)


def is_ours(path: Path) -> bool:
    """Whether a file is a result, a resolved config or a picture of ours."""
    try:
        if not path.is_file():
            return False
        if path.suffix == ".png":
            with path.open("rb") as file:
                return b"tEXtCreator\0ubmoe" in file.read(2048)
        read: Any = {".json": json.loads, ".yaml": yaml.safe_load}[path.suffix]
        content = read(read_text(path, METADATA if path.suffix == ".json" else SMALL))
    except (OSError, KeyError, ValueError, RecursionError, yaml.YAMLError):
        return False
    kinds = (RESULT, FETCHED) if path.suffix == ".json" else (RESOLVED,)
    return isinstance(content, dict) and any(kind <= content.keys() for kind in kinds)
