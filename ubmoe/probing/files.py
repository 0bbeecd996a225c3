"""The five probing tasks from the files that Feng et al. released.

Words are found by the files' own indices (of tokens between spaces, from 0), or by their form; what
cannot be placed is counted and listed, never guessed.
"""

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ubmoe.config import UserError
from ubmoe.data.rows import decoded, finite_number
from ubmoe.probing.items import FEATURES, IRREGULAR, Items, Task, bare, lemma, text, tokens
from ubmoe.probing.word_vectors import Word

NORMS = (
    *("Vision", "Hearing", "Olfaction", "Interoception", "Taste", "Touch"),
    *("Foot_leg", "Mouth_throat", "Torso", "Head", "Hand_arm"),
)


def _lines(folder: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """(file:line, line) of the one file that fits, blank lines left out."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"probing.data: {folder} has no {pattern}")
    lines = decoded(found[0]).split("\n")
    if not any(line.strip() for line in lines):
        raise UserError(f"{found[0]}: empty; expected rows")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{found[0]}:{number}", line


def _columns(where: str, line: str, count: int) -> list[str]:
    cells = line.split("\t")
    if len(cells) != count:
        raise UserError(f"{where}: got {len(cells)} columns, expected {count}")
    return cells


def _whole(where: str, value: str) -> int:
    if not re.fullmatch(r"\d+", value.strip()):
        raise UserError(f"{where}: got {value!r}, expected a whole number")
    return int(value)


def _at(where: str, words: list[Word], index: int) -> Word:
    if index >= len(words):
        raise UserError(f"{where}: word {index} of a sentence of {len(words)} words")
    return bare(words[index])


def _context(folder: Path) -> list[Task]:
    """Five words a sentence; each position is a task of its own for each feature."""
    found = []
    for feature, target in FEATURES.items():
        places = [Items() for _ in range(5)]
        test = []
        for split in ("train", "test"):
            for where, line in _lines(folder, f"Task1*/{feature}/{split}.txt"):
                sentence, _, label = line.rpartition(",")
                words = tokens(sentence)
                if len(words) != 5 or label.strip() not in ("0", "1"):
                    raise UserError(f"{where}: expected five words, a comma and 0 or 1")
                for items, word in zip(places, words, strict=True):
                    items.add((word,), int(label), text(words[target]))
                test.append(split == "test")
        found += [
            items.task(f"{feature}@{number}", test=np.array(test))
            for number, items in enumerate(places, 1)
        ]
    return found


def _aspect(folder: Path) -> list[Task]:
    """Telicity and duration of a verb; a wrong index falls back to the verb's first occurrence.

    A `verb` without a letter, of which the files have some, is none: it is listed as unplaced.
    """
    found = []
    for name in ("telicity", "duration"):
        items = Items()
        for where, line in _lines(folder, f"Task2*/{name}_train.txt"):
            _, sentence, verb, index, label = _columns(where, line, 5)
            words, place = tokens(sentence), _whole(where, index)
            if not re.search(r"[^\W\d_]", verb):
                items.unplaced.append(f"{where}: {verb}")
                continue
            if place >= len(words) or text(words[place]) != verb:
                same = [word for word in words if text(word) == verb]
                if not same:
                    items.unplaced.append(f"{where}: {verb}")
                    continue
                words, place = same, 0
            if label.strip() not in ("0", "1"):
                raise UserError(f"{where}: got {label!r}, expected 0 or 1")
            items.add((words[place],), int(label), lemma(verb))
        found.append(items.task(name))
    return found


def _concreteness(folder: Path) -> list[Task]:
    items = Items()
    (header, first), *lines = _lines(folder, "Task3*/*.txt")
    if "TARGET" not in first:
        raise UserError(f"{header}: expected a header with TARGET")
    for where, line in lines:
        _, target, _, index, sentence, score = _columns(where, line, 6)
        word = _at(where, tokens(sentence), _whole(where, index))
        items.add((word,), [finite_number(where, score)], lemma(target))
    return [items.task("concreteness")]


def _sensorimotor(folder: Path) -> list[Task]:
    """Eleven norms of a word; it is found by its form, or by one that begins with it."""
    items = Items()
    lines = list(_lines(folder, "Task4*/*.txt"))
    header = next(csv.reader([lines[0][1]]))
    if missing := {"word", "sentence", *(f"{norm}.M" for norm in NORMS)} - set(header):
        raise UserError(f"{lines[0][0]}: no column {', '.join(sorted(missing))}")
    for where, line in lines[1:]:
        cells = next(csv.reader([line]))
        if len(cells) != len(header):
            raise UserError(f"{where}: got {len(cells)} columns, expected {len(header)}")
        row = dict(zip(header, cells, strict=True))
        word = _of_form(row["word"].lower(), tokens(row["sentence"]))
        if word is None:
            items.unplaced.append(f"{where}: {row['word']}")
            continue
        norms = [finite_number(where, row[f"{norm}.M"]) for norm in NORMS]
        items.add((word,), norms, lemma(row["word"]))
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
    for (where, line), label in zip(rows, gold, strict=True):
        word, _, indices, *pair = _columns(where, line, 5)
        places = [_whole(where, index) for index in indices.split("-")]
        if len(places) != 2:
            raise UserError(f"{where}: got {indices!r}, expected two indices as 4-4")
        first, second = (
            _at(where, tokens(sentence), place)
            for sentence, place in zip(pair, places, strict=True)
        )
        items.add((first, second), int(label == "T"), lemma(word))
    return [items.task("word in context")]


READERS: dict[str, Callable[[Path], list[Task]]] = {
    "context": _context,
    "aspect": _aspect,
    "concreteness": _concreteness,
    "sensorimotor": _sensorimotor,
    "wic": _word_in_context,
}
