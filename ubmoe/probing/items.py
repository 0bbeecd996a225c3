"""Words in sentences, and the items of a probing task that are made of them."""

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from ubmoe.probing.word_vectors import Word

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
    """N items of one or two words each, and the labels to predict from their vectors.

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
class Items:
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
    """The common key of a word's inflections: an irregular one's lemma, else Porter's stem."""
    known = IRREGULAR.get(form.lower(), form.lower())
    return str(_stemmer().stem(known))


@cache
def _stemmer() -> Any:
    from nltk.stem import PorterStemmer

    return PorterStemmer()


def bare(word: Word) -> Word:
    """The word without the punctuation around it; punctuation alone stays."""
    match = re.fullmatch(r"(\W*)(.*?)(\W*)", text(word), re.DOTALL)
    before, inside, _ = match.groups() if match else ("", "", "")
    if not inside:
        return word
    start = word.start + len(before)
    return Word(word.sentence, start, start + len(inside))


def tokens(sentence: str) -> list[Word]:
    """The words between spaces."""
    return [Word(sentence, match.start(), match.end()) for match in re.finditer(r"\S+", sentence)]


def text(word: Word) -> str:
    return word.sentence[word.start : word.end]
