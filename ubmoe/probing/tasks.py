"""The five probing tasks of Feng et al., from their files or from the embedded language.

What is probed is a word in a sentence. Words are found by the files' own indices (of tokens between
spaces, from 0), or by their form; what cannot be placed is counted and listed, never guessed.
"""

import csv
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ubmoe.config import UserError
from ubmoe.data.rows import decoded
from ubmoe.probing.word_vectors import Word
from ubmoe.tiny import language

NORMS = (
    *("Vision", "Hearing", "Olfaction", "Interoception", "Taste", "Touch"),
    *("Foot_leg", "Mouth_throat", "Torso", "Head", "Hand_arm"),
)
# Forms that share no stem with their lemma; the last of each line is the lemma.
IRREGULAR = {
    form: forms.split()[-1]
    for forms in (
        "am is are was were been being 's 're 'm be",
        *("has had having 've have", "does did done do", "goes went gone go", "said say"),
        *("got gotten get", "made make", "knew known know", "thought think", "took taken take"),
        *("saw seen see", "came come", "gave given give", "found find", "told tell", "felt feel"),
        *("became become", "left leave", "brought bring", "began begun begin", "kept keep"),
        *("held hold", "wrote written write", "stood stand", "heard hear", "meant mean"),
        *("met meet", "ran run", "paid pay", "sat sit", "spoke spoken speak", "lay lain lie"),
        *("led lead", "grew grown grow", "lost lose", "fell fallen fall", "sent send"),
        *("built build", "understood understand", "drew drawn draw", "broke broken break"),
        *("spent spend", "rose risen rise", "drove driven drive", "bought buy", "wore worn wear"),
        *("chose chosen choose", "sought seek", "threw thrown throw", "caught catch"),
        *("dealt deal", "won win", "sold sell", "fought fight", "taught teach", "ate eaten eat"),
        *("sang sung sing", "slept sleep", "flew flown fly", "drank drunk drink", "swam swum swim"),
    )
    for form in forms.split()
}
FEATURES = {"subject_animacy": 1, "verb_causative": 2, "verb_dynamic": 2, "object_animacy": 4}


@dataclass(frozen=True)
class Task:
    """N items of one or two words each, and what is to be told from their vectors.

    targets: (N,) 0 or 1, or (N, K) numbers. groups: the lemma that each item is about, by which
    splits and errors are clustered. test: the shipped split, where there is one.
    """

    name: str
    words: list[tuple[Word, ...]]
    targets: np.ndarray
    groups: list[str]
    test: np.ndarray | None = None
    unplaced: list[str] = field(default_factory=list)

    @property
    def binary(self) -> bool:
        return self.targets.ndim == 1

    @property
    def paired(self) -> bool:
        return len(self.words[0]) == 2


@dataclass
class _Items:
    """A task while its file is read."""

    words: list[tuple[Word, ...]] = field(default_factory=list)
    targets: list[float | list[float]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    unplaced: list[str] = field(default_factory=list)

    def add(self, words: tuple[Word, ...], target: float | list[float], group: str) -> None:
        self.words.append(words)
        self.targets.append(target)
        self.groups.append(group)

    def task(self, name: str, **keys: object) -> Task:
        return Task(
            name,
            self.words,
            np.array(self.targets, dtype=np.float64),
            self.groups,
            unplaced=self.unplaced,
            **keys,  # type: ignore[arg-type]
        )


def lemma(form: str) -> str:
    """What inflections of a word share: an irregular one's lemma, else Porter's stem."""
    known = IRREGULAR.get(form.lower(), form.lower())
    return str(_stemmer().stem(known))


@cache
def _stemmer() -> Any:
    from nltk.stem import PorterStemmer

    return PorterStemmer()


def bare(word: Word) -> Word:
    """The word without the punctuation around it; punctuation alone stays."""
    found = re.fullmatch(r"(\W*)(.*?)(\W*)", text(word), re.DOTALL)
    before, inside, _ = found.groups() if found else ("", "", "")
    if not inside:
        return word
    start = word.start + len(before)
    return Word(word.sentence, start, start + len(inside))


def tokens(sentence: str) -> list[Word]:
    """The words between spaces."""
    return [Word(sentence, found.start(), found.end()) for found in re.finditer(r"\S+", sentence)]


def text(word: Word) -> str:
    return word.sentence[word.start : word.end]


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


# --- the files ------------------------------------------------------------------------------------


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
        places = [_Items() for _ in range(5)]
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
        items = _Items()
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
    items = _Items()
    (header, first), *lines = _lines(folder, "Task3*/*.txt")
    if "TARGET" not in first:
        raise UserError(f"{header}: expected a header with TARGET")
    for where, line in lines:
        _, target, _, index, sentence, score = _columns(where, line, 6)
        word = _at(where, tokens(sentence), _whole(where, index))
        items.add((word,), [_number(where, score)], lemma(target))
    return [items.task("concreteness")]


def _sensorimotor(folder: Path) -> list[Task]:
    """Eleven norms of a word; it is found by its form, or by one that begins with it."""
    items = _Items()
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
        norms = [_number(where, row[f"{norm}.M"]) for norm in NORMS]
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
    items = _Items()
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


def _number(where: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{where}: got {value!r}, expected a number")
    return found


READERS: dict[str, Callable[[Path], list[Task]]] = {
    "context": _context,
    "aspect": _aspect,
    "concreteness": _concreteness,
    "sensorimotor": _sensorimotor,
    "wic": _word_in_context,
}


# --- the embedded language ------------------------------------------------------------------------

TINY_SEED, TINY_ITEMS = 21, 1200
KINDS = ("person", "animal", "food", "thing")
CONCRETE = {"person": 2.0, "animal": 3.0, "food": 4.0, "thing": 5.0}


def _tiny_context() -> list[Task]:
    """`the N V the N`, every word drawn alone, so that none tells of another."""
    found = []
    for feature, target in FEATURES.items():
        rng = random.Random(f"{TINY_SEED} {feature}")
        places = [_Items() for _ in range(5)]
        for _ in range(2 * TINY_ITEMS):
            agent, patient = rng.choices(language.NOUNS, k=2)
            verb = rng.choice(language.VERBS)
            label = {
                "subject_animacy": agent.animate,
                "verb_causative": verb.causative,
                "verb_dynamic": verb.dynamic,
                "object_animacy": patient.animate,
            }[feature]
            said = [rng.choice(concept.words) for concept in (agent, verb, patient)]
            words = tokens("the {} {} the {}".format(*said))
            for items, word in zip(places, words, strict=True):
                items.add((word,), int(label), text(words[target]))
        found += [items.task(f"{feature}@{number}") for number, items in enumerate(places, 1)]
    return found


@dataclass(frozen=True)
class _Said:
    """A meaning in words, with its verb and nouns found in them."""

    meaning: language.Meaning
    verb: Word
    agent: Word
    patient: Word


def _said(count: int) -> list[_Said]:
    rng, found = random.Random(TINY_SEED), []
    for _ in range(count):
        meaning = language.draw(rng)
        wording = tuple(rng.randrange(2) for _ in meaning)
        sentence = language.express(meaning, language.ORDERS[0], wording)
        words = tokens(sentence)
        agent, verb, patient = (
            next(w for w in map(bare, words) if text(w).lower() == concept.words[form])
            for concept, form in (
                (meaning.agent, wording[1]),
                (meaning.verb, wording[2]),
                (meaning.patient, wording[4]),
            )
        )
        found.append(_Said(meaning, verb, agent, patient))
    return found


def _tiny_aspect() -> list[Task]:
    causative, dynamic = _Items(), _Items()
    for said in _said(TINY_ITEMS):
        verb = said.meaning.verb
        causative.add((said.verb,), int(verb.causative), text(said.verb))
        dynamic.add((said.verb,), int(verb.dynamic), text(said.verb))
    return [causative.task("telicity"), dynamic.task("duration")]


def _tiny_concreteness() -> list[Task]:
    """A noun's kind, and a little of what it does."""
    items = _Items()
    for said in _said(TINY_ITEMS // 2):
        score = CONCRETE[said.meaning.agent.kind] + 0.5 * said.meaning.verb.dynamic
        items.add((said.agent,), [score], text(said.agent).lower())
    return [items.task("concreteness")]


def _tiny_sensorimotor() -> list[Task]:
    items = _Items()
    for said in _said(TINY_ITEMS // 2):
        norms = [5.0 * (said.meaning.patient.kind == kind) for kind in KINDS]
        items.add((said.patient,), norms, text(said.patient).lower())
    return [items.task("sensorimotor")]


def _tiny_wic() -> list[Task]:
    """Does a noun do the same in both sentences: act, or suffer?"""
    rng, items = random.Random(TINY_SEED), _Items()
    roles: dict[str, tuple[list[Word], list[Word]]] = {}
    for said in _said(TINY_ITEMS * 2):
        for role, word in enumerate((said.agent, said.patient)):
            roles.setdefault(text(word).lower(), ([], []))[role].append(word)
    both = sorted(noun for noun, (acts, suffers) in roles.items() if len(acts) > 1 < len(suffers))
    for number in range(TINY_ITEMS // 2):
        noun = rng.choice(both)
        acts, suffers = roles[noun]
        same = number % 2
        pair = rng.sample(rng.choice((acts, suffers)), 2)
        if not same:
            pair = [rng.choice(acts), rng.choice(suffers)]
        items.add((pair[0], pair[1]), same, noun)
    return [items.task("word in context")]


TINY: dict[str, Callable[[], list[Task]]] = {
    "context": _tiny_context,
    "aspect": _tiny_aspect,
    "concreteness": _tiny_concreteness,
    "sensorimotor": _tiny_sensorimotor,
    "wic": _tiny_wic,
}
