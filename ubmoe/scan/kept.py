"""What an interrupted run over rows has computed, and goes on from."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ubmoe import marked

log = logging.getLogger(__name__)
SAVE_EVERY = 30.0  # seconds


class Kept:
    """(..., rows) values, NaN where not yet computed, in a file that is replaced whole.

    mark: what the values depend on; those of another mark are not taken.
    """

    def __init__(
        self, path: Path, mark: dict[str, Any], shape: tuple[int, ...], dtype: type = np.float64
    ) -> None:
        self.path, self.mark = path, mark
        self.values: np.ndarray = np.full(shape, np.nan, dtype)
        self.saved = time.monotonic()

    def missing(self) -> list[int]:
        """Rows that are to be computed."""
        return np.flatnonzero(np.isnan(self.values).reshape(-1, self.values.shape[-1])[-1]).tolist()

    def save(self) -> None:
        marked.write(self.path, self.mark, values=self.values)
        self.saved = time.monotonic()

    def load(self) -> None:
        """Take what an interrupted run of the same mark left, if anything."""
        if found := marked.read(self.path, self.mark, "values"):
            [self.values] = found
            log.info("resuming, %d rows still to do", len(self.missing()))

    @contextmanager
    def filling(self, tokens: Sequence[int], name: str) -> Iterator["Filling"]:
        """A progress bar over the tokens of the missing rows; what is complete stays on Ctrl-C."""
        total = sum(tokens[row] for row in self.missing())
        with tqdm(total=total, desc=name, unit="token", unit_scale=True, disable=None) as bar:
            try:
                yield Filling(self, tokens, bar)
            except KeyboardInterrupt:
                self.save()
                raise


class Filling:
    """Takes the values of rows as they come."""

    def __init__(self, kept: Kept, tokens: Sequence[int], bar: Any) -> None:
        self.kept, self.tokens, self.bar = kept, tokens, bar

    def put(self, rows: Sequence[int], values: np.ndarray) -> None:
        self.kept.values[..., rows] = values
        if time.monotonic() - self.kept.saved > SAVE_EVERY:
            self.kept.save()
        self.bar.update(sum(self.tokens[row] for row in rows))
