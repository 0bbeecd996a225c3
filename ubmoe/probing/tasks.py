"""The five probing tasks of Feng et al., from their files or from the embedded language.

What is probed is a word in a sentence.
"""

from collections.abc import Sequence
from pathlib import Path

from ubmoe.config import UserError
from ubmoe.probing.files import READERS
from ubmoe.probing.items import Task
from ubmoe.probing.tiny import TINY


def read_tasks(data: str, kinds: Sequence[str]) -> list[Task]:
    """The tasks of the kinds context, aspect, concreteness, sensorimotor, wic.

    data: the folder that holds the five folders, or the word tiny. Raises UserError naming file and
    line for a malformed row.
    """
    if data == "tiny":
        return [task for kind in kinds for task in TINY[kind]()]
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"probing.data: {data} is no folder; expected the probing data, or tiny")
    return [task for kind in kinds for task in READERS[kind](folder)]
