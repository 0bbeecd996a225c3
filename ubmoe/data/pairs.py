"""Rows of (anchor, positive, negatives): all negatives are read, and no row below a threshold.

A file with labels or scores holds pairs that are no positives. Which are is for the user to say.
"""

import logging
import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ubmoe.config import UserError
from ubmoe.data.bad_rows import RowError, usable
from ubmoe.data.rows import Row, cell, finite_number, given, training_rows
from ubmoe.data.tokens import checking

log = logging.getLogger(__name__)
COLUMNS = {  # by what they are often called
    "anchor": ("anchor", "query", "sent0", "sentence1"),
    "positive": ("positive", "pos", "sent1", "sentence2"),
}
NEGATIVE = re.compile(r"((?:hard_?)?neg(?:ative)?s?)(?:_?(\d{1,4}))?", re.ASCII | re.IGNORECASE)
# Further texts of a row that no column above reads, and what is known of single texts.
FURTHER = re.compile(
    r"(hard[_ ]?)?neg(ative)?s?([_ ].*)?|(positive|pos|anchor|query|sent|sentence)s?[_ ]?\d+",
    re.IGNORECASE,
)
KNOWN_OF_ONE = re.compile(r".*[_ ](doc)?(score|label|id|title|rank)s?", re.IGNORECASE)
# What says whether, or how far, a row's pair is a positive. Scores of single texts are no such.
JUDGED = re.compile(
    r"(?!pos|neg|hard)(is_.*|gold|target|y|class|relation|verdict|same|match(es|ed)?|cos(ine)?|"
    r"(cos_?)?sim|.*(label|score|rating|grade|judge?ment|similarity|similar|relatedness|related|"
    r"relevance|relevant|duplicate|paraphrase|entailment|equivalen(t|ce))s?(_?(id|int|raw|mean))?)",
    re.IGNORECASE,
)
WORDS = {
    **dict.fromkeys(("entailment", "true", "yes", "positive", "duplicate", "paraphrase"), 1.0),
    **dict.fromkeys(("neutral", "contradiction", "not_entailment", "false", "no", "negative"), 0.0),
}
POSITIVE_FROM = "bi.stages.N.positive_from"


class Pairs(NamedTuple):
    """Columns anchor, positive and the negatives, and how many rows are below the threshold."""

    columns: dict[str, list[str]]
    below: int


def read_pairs(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    most: int | None = None,
    positive_from: float | None = None,
) -> Pairs:
    """The pairs of a data set; as many negatives in every row as in the first that has any.

    positive_from: only rows whose label or score is so high are positives. Raises RowError for a
    row that has another number of negatives, and for a label or score without a threshold.
    """
    rows, checked = training_rows(dataset, most), checking(tokenizer)
    counts = usable(lambda row: (row.where, len(_negatives(row))), rows)
    first, count = next((counted for counted in counts if counted[1]), ("", 0))

    def read(row: Row) -> list[str] | None:
        if not _is_positive(row, positive_from):
            return None
        _check_read(row)
        negatives = _negatives(row)
        if len(negatives) != count:
            has, other = (_counted(number) for number in (len(negatives), count))
            raise RowError(
                row.where,
                f"has {has}, and {first} has {other}; expected as many in every row",
            )
        texts = [cell(row, names) for names in COLUMNS.values()]
        texts += [cell(Row(row.where, {name: value}), [name]) for name, value in negatives]
        return [checked(row.where, text) for text in texts]

    pairs = list(usable(read, rows))
    kept = [texts for texts in pairs if texts is not None]
    below = len(pairs) - len(kept)
    if positive_from is not None:
        if pairs and not kept:
            raise UserError(
                f"{dataset}: all of its {below} rows are below {POSITIVE_FROM}={positive_from:g}"
            )
        log.info("%s: %d rows below positive_from left out, %d kept", dataset, below, len(kept))
    names = [*COLUMNS, *([f"negative_{n + 1}" for n in range(count)] if count > 1 else [])]
    names += ["negative"] if count == 1 else []
    return Pairs({name: [row[n] for row in kept] for n, name in enumerate(names)}, below)


def _counted(negatives: int) -> str:
    return f"{negatives or 'no'} negative{'s' * (negatives > 1)}"


def _negatives(row: Row) -> list[tuple[str, Any]]:
    """(column, text) of each negative by its number; a list holds several. Raises RowError where
    one between them lacks, or two columns are the same one.
    """
    there = [name for name in row.fields if row.fields[name] is not None and row.fields[name] != []]
    matches = [match for name in there if (match := NEGATIVE.fullmatch(name))]
    columns = sorted((int(match[2] or -1), match[0]) for match in matches)
    numbers = [number for number, _ in columns]
    plain, rest = numbers.count(-1), [number for number in numbers if number >= 0]
    starts = (0, 1, 2) if plain else (0, 1)
    if plain > 1 or (rest and (rest[0] not in starts or rest != [*range(rest[0], rest[-1] + 1)])):
        names = ", ".join(name for _, name in columns)
        raise RowError(
            row.where, f"has {names}; expected one column of negatives, or numbers without a gap"
        )
    values = [(name, row.fields[name]) for _, name in columns]
    return [
        (name, item)
        for name, value in values
        for item in (value if isinstance(value, list) else [value])
    ]


def _check_read(row: Row) -> None:
    """Raises RowError for a column of further texts that would be passed over."""
    read = {name for names in COLUMNS.values() for name in names}
    for name, value in row.fields.items():
        if name in read or NEGATIVE.fullmatch(name) or KNOWN_OF_ONE.fullmatch(name):
            continue
        if FURTHER.fullmatch(name) and value not in (None, "", []):
            raise RowError(
                row.where,
                f"has a column {name}, which is not read; expected negative, or negative_1, "
                "negative_2, ... for further texts, or a row without it",
            )


def _is_positive(row: Row, positive_from: float | None) -> bool:
    """Whether a row's label or score is at or above the threshold."""
    judged = [
        name for name in row.fields if JUDGED.fullmatch(name) and given(row, [name]) is not None
    ]
    if not judged:
        if positive_from is not None:
            raise RowError(row.where, f"has no label or score to hold against {POSITIVE_FROM}")
        return True
    if positive_from is None:
        raise RowError(
            row.where,
            f"has a column {judged[0]}, and not every pair may be a positive; say from which value "
            f"on in {POSITIVE_FROM} (1 for labels), or remove the column",
        )
    if len(judged) > 1:
        raise RowError(row.where, f"has {' and '.join(judged)}; expected one label or score")
    value = given(row, judged)
    if isinstance(value, str):
        value = WORDS.get(value.strip().lower(), value)
    if not isinstance(value, str | int | float):
        raise RowError(row.where, f"{judged[0]} is {value!r:.60}; expected a number or a word")
    number = value if isinstance(value, str) else str(float(value))
    return finite_number(row.where, number, judged[0]) >= positive_from
