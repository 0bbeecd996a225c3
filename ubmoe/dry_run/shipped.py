"""Models and data sets that are on no disk here: shapes of those that configs/ names.

A dry run asks no hub about them. What is in the hub's cache is read from there; of other models the
shape is in shapes.json, with its source; of other data sets the rows are counted, not read.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, TypeVar

from huggingface_hub import constants, try_to_load_from_cache

from ubmoe.bounds import expanded
from ubmoe.config import Config, ModelSection, UserError
from ubmoe.data.rows import chosen_rows, is_file
from ubmoe.files import write_json

SHIPPED: dict[str, Any] = json.loads(
    Path(__file__).with_name("shapes.json").read_text(encoding="utf-8")
)
PATIENCE = 3.0  # seconds in which a hub answers, its name looked up
COUNTED = (
    "is not on this machine: the estimate is an upper bound, of its published shape and of rows "
    "that are all as long as their limit"
)
Data = TypeVar("Data")


@dataclass(frozen=True)
class Unread:
    """Rows that are counted and not read; each is as long as its limit of tokens."""

    count: int

    def __len__(self) -> int:
        return self.count


@contextmanager
def without_hub(config: Config) -> Iterator[Config]:
    """The configuration to plan with; a model of which only the shape is known is a folder of it.

    Inside, the hub's libraries read their cache alone, unless the model is neither in it nor in
    shapes.json. Raises UserError where then no hub answers.
    """
    name = config.model.name
    if not is_hub_id(config.model) or _is_cached(config.model):
        with _offline():
            yield config
    elif name in SHIPPED["models"]:
        with _offline(), TemporaryDirectory(prefix="ubmoe-shape-") as folder:
            write_json(Path(folder) / "config.json", SHIPPED["models"][name]["config"])
            model = config.model.model_copy(update={"name": folder, "revision": None})
            yield config.model_copy(update={"model": model})
    elif hub_answers():
        yield config
    else:
        raise UserError(
            f"model.name: {name} is not on this machine, and no hub answers; expected a network, a "
            "local directory or .gguf file, or a model of configs/, whose shapes are shipped"
        )


def is_hub_id(model: ModelSection) -> bool:
    """Whether a model's name is none of a directory, of a file, and the word tiny."""
    path = expanded(model.name)
    is_file = path.suffix.lower() == ".gguf" or path.is_absolute() or path.exists()
    return not (model.name == "tiny" or is_file or model.name.startswith((".", "~")))


def is_shape(model: ModelSection) -> bool:
    """Whether a model is a folder that `without_hub` made: a shape, without a tokenizer."""
    return Path(model.name).name.startswith("ubmoe-shape-")


def read_or_count(
    model: ModelSection,
    dataset: str,
    most: int | None,
    read: Callable[[], Data],
    rows: Callable[[str, int | None], Sized] = chosen_rows,
) -> Data | Unread:
    """The data that the program reads; or their number of rows, where text or tokenizer is missing.

    most: rows at most. rows: reads them without a tokenizer. Raises UserError where their number
    is not known.
    """
    here = _is_here(dataset)
    if here and not is_shape(model):
        return read()
    known = len(rows(dataset, None)) if here else SHIPPED["rows"].get(dataset, {}).get("rows")
    counts = [count for count in (most, known) if count is not None]
    if not counts:
        raise UserError(
            f"{dataset}: not on this machine, and its number of rows is not known; expected a "
            "limit such as max_rows=20000, or python -m ubmoe.results prefetch before"
        )
    return Unread(min(counts))


def _is_here(dataset: str) -> bool:
    if dataset == "tiny" or is_file(dataset):
        return True
    try:
        chosen_rows(dataset, 1)
    except UserError:
        return False
    return True


def _is_cached(model: ModelSection) -> bool:
    names = ("config.json", "tokenizer.json")
    cached = (try_to_load_from_cache(model.name, name, revision=model.revision) for name in names)
    return all(isinstance(path, str) for path in cached)


@contextmanager
def _offline() -> Iterator[None]:
    """The libraries would ask a hub for minutes where none answers."""
    import datasets.config

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def hub_answers() -> bool:
    """Whether the hub answers within PATIENCE; looking up its name may block for longer."""
    if constants.is_offline_mode():
        return False
    endpoint, answers = os.environ.get("HF_ENDPOINT", constants.ENDPOINT), []

    def ask() -> None:
        try:
            urllib.request.urlopen(endpoint, timeout=PATIENCE).close()
            answers.append(True)
        except urllib.error.HTTPError:  # an answer, too
            answers.append(True)
        except (OSError, ValueError):
            pass

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answers)
