"""Rows that cannot be used: an error, or dropped and counted where `data.skip_bad_rows` says so.

What a run does with them is set once, around the run (`dropping`), so that every reader agrees.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from ubmoe.config import UserError

log = logging.getLogger(__name__)
Given = TypeVar("Given")
Found = TypeVar("Found")
NAMED = 3  # of the dropped rows, in the log


class RowError(UserError):
    """One row that cannot be used: where it stands, what was found, what would be right."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where


_dropped: ContextVar[set[str] | None] = ContextVar("dropped", default=None)


@contextmanager
def dropping(wanted: bool) -> Iterator[set[str]]:
    """Inside, a bad row is dropped where that is wanted; yields where the dropped ones stand."""
    dropped: set[str] = set()
    token = _dropped.set(dropped if wanted else None)
    try:
        yield dropped
    finally:
        _dropped.reset(token)


def usable(read: Callable[[Given], Found], rows: Iterable[Given]) -> Iterator[Found]:
    """The rows as read. Raises RowError for a bad one, or drops it inside `dropping`."""
    for row in rows:
        try:
            item = read(row)
        except RowError as error:
            dropped = _dropped.get()
            if dropped is None:
                raise
            if error.where not in dropped and len(dropped) < NAMED:
                log.warning("dropped %s", error)
            dropped.add(error.where)
        else:
            yield item
