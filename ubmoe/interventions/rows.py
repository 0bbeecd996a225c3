"""Values of rows; an unfinished run keeps the computed ones."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ubmoe.unfinished import Unfinished

log = logging.getLogger(__name__)
Put = Callable[[Sequence[int], np.ndarray], None]


class Rows:
    """(..., rows) values, NaN where not yet computed; key: what they depend on."""

    def __init__(
        self, path: Path, key: dict[str, Any], shape: tuple[int, ...], dtype: type = np.float64
    ) -> None:
        self.unfinished = Unfinished(path, key)
        self.values: np.ndarray = np.full(shape, np.nan, dtype)

    def missing(self) -> list[int]:
        """Rows that are to be computed."""
        return np.flatnonzero(np.isnan(self.values).reshape(-1, self.values.shape[-1])[-1]).tolist()

    def save(self) -> None:
        self.unfinished.save(values=self.values)

    def load(self) -> None:
        """Take what an interrupted run of the same key left, if anything."""
        if kept := self.unfinished.load("values"):
            [self.values] = kept
            log.info("resuming, %d rows still to do", len(self.missing()))

    @contextmanager
    def filling(self, tokens: Sequence[int], name: str) -> Iterator[Put]:
        """A progress bar over the tokens of the missing rows; what is complete stays on Ctrl-C.

        Yields what takes the values of rows as they come.
        """

        def put(rows: Sequence[int], values: np.ndarray) -> None:
            self.values[..., rows] = values
            if self.unfinished.is_due():
                self.save()
            bar.update(sum(tokens[row] for row in rows))

        total = sum(tokens[row] for row in self.missing())
        with (
            tqdm(total=total, desc=name, unit="token", unit_scale=True, disable=None) as bar,
            self.unfinished.kept_on_interrupt(self.save),
        ):
            yield put
