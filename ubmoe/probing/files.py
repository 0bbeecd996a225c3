"""The five probing tasks from the files that Feng et al. released.

Words are found by the files' own indices (of tokens between spaces, from 0), or by their form; what
cannot be placed is counted and listed, never guessed.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ubmoe.config import UserError
from ubmoe.data.bad_rows import RowError, usable
from ubmoe.data.rows import Row, decoded, finite_number, table_rows
from ubmoe.probing.items import FEATURES, IRREGULAR, Items, Task, bare, lemma, text, tokens
from ubmoe.probing.word_vectors import Word

NORMS = (
    *("Vision", "Hearing", "Olfaction", "Interoception", "Taste", "Touch"),
    *("Foot_leg", "Mouth_throat", "Torso", "Head", "Hand_arm"),
)


Line = tuple[str, str]  # file:line, and what stands there
Item = tuple[tuple[Word, ...], Any, str]  # words, target, group


def _file(folder: Path, pattern: str) -> tuple[Path, str]:
    """The one file that fits, and its text."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"probing.data: {folder} has no {pattern}")
    text = decoded(files[0])
    if not text.strip():
        raise UserError(f"{files[0]}: empty; expected rows")
    return files[0], text


def _lines(folder: Path, pattern: str) -> Iterator[Line]:
    """The lines of the one file that fits, blank ones left out."""
    path, text = _file(folder, pattern)
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _placed(items: Items, read: Callable[[Any], Item | None], rows: Iterable[Any]) -> None:
    """Add what is read of each row; None: its word is nowhere, which `read` has listed."""
    for placed in usable(read, rows):
        if placed is not None:
            items.add(*placed)


def _columns(where: str, line: str, count: int) -> list[str]:
    cells = line.split("\t")
    if len(cells) != count:
        raise RowError(where, f"got {len(cells)} columns, expected {count}")
    return cells


def _whole(where: str, value: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", value.strip()):
        raise RowError(where, f"got {value!r}, expected a whole number")
    return int(value)


def _at(where: str, words: list[Word], index: int) -> Word:
    if index >= len(words):
        raise RowError(where, f"word {index} of a sentence of {len(words)} words")
    return bare(words[index])


def _context(folder: Path) -> list[Task]:
    """Five words a sentence; each position is a task of its own for each feature."""
    tasks = []
    for feature, target in FEATURES.items():
        places = [Items() for _ in range(5)]
        test = []
        for split in ("train", "test"):
            for words, label in usable(_five, _lines(folder, f"Task1*/{feature}/{split}.txt")):
                for items, word in zip(places, words, strict=True):
                    items.add((word,), label, text(words[target]))
                test.append(split == "test")
        tasks += [
            items.task(f"{feature}@{number}", test=np.array(test))
            for number, items in enumerate(places, 1)
        ]
    return tasks


def _five(given: Line) -> tuple[list[Word], int]:
    where, line = given
    sentence, _, label = line.rpartition(",")
    words = tokens(sentence)
    if len(words) != 5 or label.strip() not in ("0", "1"):
        raise RowError(where, "expected five words, a comma and 0 or 1")
    return words, int(label)


def _aspect(folder: Path) -> list[Task]:
    """Telicity and duration of a verb; a wrong index falls back to the verb's first occurrence.

    A `verb` without a letter, of which the files have some, is none: it is listed as unplaced.
    """
    tasks = []
    for name in ("telicity", "duration"):
        items = Items()

        def read(given: Line, items: Items = items) -> Item | None:
            where, line = given
            _, sentence, verb, index, label = _columns(where, line, 5)
            words, place = tokens(sentence), _whole(where, index)
            same = [word for word in words if text(word) == verb]
            if not re.search(r"[^\W\d_]", verb) or not same:
                items.unplaced.append(f"{where}: {verb}")
                return None
            there = place < len(words) and text(words[place]) == verb
            if label.strip() not in ("0", "1"):
                raise RowError(where, f"got {label!r}, expected 0 or 1")
            return (words[place] if there else same[0],), int(label), lemma(verb)

        _placed(items, read, _lines(folder, f"Task2*/{name}_train.txt"))
        tasks.append(items.task(name))
    return tasks


def _concreteness(folder: Path) -> list[Task]:
    items = Items()
    (header, first), *lines = _lines(folder, "Task3*/*.txt")
    if "TARGET" not in first:
        raise UserError(f"{header}: expected a header with TARGET")

    def read(given: Line) -> Item:
        where, line = given
        _, target, _, index, sentence, score = _columns(where, line, 6)
        word = _at(where, tokens(sentence), _whole(where, index))
        return (word,), [finite_number(where, score)], lemma(target)

    _placed(items, read, lines)
    return [items.task("concreteness")]


def _sensorimotor(folder: Path) -> list[Task]:
    """Eleven norms of a word; it is found by its form, or by one that begins with it."""
    items = Items()
    path, lines = _file(folder, "Task4*/*.txt")

    def read(row: Row) -> Item | None:
        if missing := {"word", "sentence", *(f"{norm}.M" for norm in NORMS)} - set(row.fields):
            raise UserError(f"{path}:1: no column {', '.join(sorted(missing))}")
        word = _of_form(row.fields["word"].lower(), tokens(row.fields["sentence"]))
        if word is None:
            items.unplaced.append(f"{row.where}: {row.fields['word']}")
            return None
        norms = [finite_number(row.where, row.fields[f"{norm}.M"]) for norm in NORMS]
        return (word,), norms, lemma(row.fields["word"])

    _placed(items, read, table_rows(path, lines))
    return [items.task("sensorimotor")]


def _of_form(wanted: str, words: list[Word]) -> Word | None:
    """The word that is the wanted lemma, else an irregular form, else one that begins like it."""
    tests: tuple[Callable[[str], bool], ...] = (
        lambda form: form == wanted,
        lambda form: IRREGULAR.get(form) == wanted,
        lambda form: form.startswith(wanted),
    )
    inside = [bare(word) for word in words]
    return next((word for fits in tests for word in inside if fits(text(word).lower())), None)


def _word_in_context(folder: Path) -> list[Task]:
    items = Items()
    gold = [line.strip() for _, line in _lines(folder, "Task5*/test.gold.txt")]
    rows = list(_lines(folder, "Task5*/test.data.txt"))
    if len(gold) != len(rows) or set(gold) - {"T", "F"}:
        raise UserError(f"{folder}: {len(gold)} gold labels for {len(rows)} pairs, each T or F")

    def read(given: tuple[Line, str]) -> Item:
        (where, line), label = given
        word, _, indices, *pair = _columns(where, line, 5)
        places = [_whole(where, index) for index in indices.split("-")]
        if len(places) != 2:
            raise RowError(where, f"got {indices!r}, expected two indices as 4-4")
        first, second = (
            _at(where, tokens(sentence), place)
            for sentence, place in zip(pair, places, strict=True)
        )
        return (first, second), int(label == "T"), lemma(word)

    _placed(items, read, zip(rows, gold, strict=True))
    return [items.task("word in context")]


READERS: dict[str, Callable[[Path], list[Task]]] = {
    "context": _context,
    "aspect": _aspect,
    "concreteness": _concreteness,
    "sensorimotor": _sensorimotor,
    "wic": _word_in_context,
}
