"""Chats and texts of a hub id, a local file or the embedded language; complaints name the line."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ubmoe.config import UserError
from ubmoe.tiny import language

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt")
TINY_CHATS = 400  # held out of the embedded language
TINY_HELD_OUT_SEED = 1  # unlike the seed that the embedded model was trained with
TINY_SENTENCES, TINY_SENTENCES_SEED = 8000, 3
Item = TypeVar("Item")
SENTENCE = ("text", "sentence")  # what the column of sentences is called


@dataclass(frozen=True)
class Row:
    """One row of a data set: its fields, and where it stands (`file:line`) for complaints."""

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Text:
    """What a language model is shown: chat messages, or plain text."""

    where: str
    content: list[dict[str, str]] | str

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.content, str)


def read_texts(dataset: str, most: int | None = None) -> list[Text]:
    """Rows with `messages` (chats) or `text`, at most `most` of them, spaced evenly over the data.

    Raises UserError for a missing, empty or malformed data set, naming file and line.
    """
    if dataset == "tiny":
        chats = language.chats(min(most or TINY_CHATS, TINY_CHATS), seed=TINY_HELD_OUT_SEED)
        return [Text(f"tiny:{number}", chat["messages"]) for number, chat in enumerate(chats, 1)]
    rows = list(read_rows(dataset))
    if not rows:
        raise UserError(f"{dataset}: empty; expected rows with messages or text")
    return [_text(row) for row in spaced(rows, most)]


def training_rows(dataset: str, most: int | None = None) -> list[Row]:
    """Rows to train on, at most `most` of them; for the word tiny, sentences of the language."""
    if dataset != "tiny":
        return spaced(list(read_rows(dataset)), most)
    sentences = language.sentences(
        min(most or TINY_SENTENCES, TINY_SENTENCES), seed=TINY_SENTENCES_SEED
    )
    return [Row(f"tiny:{number}", {"text": text}) for number, text in enumerate(sentences, 1)]


def cell(row: Row, names: Iterable[str], blank: bool = False) -> str:
    """The text of the first of the named columns that is there. Raises UserError naming the row."""
    found = next((row.fields[name] for name in names if name in row.fields), None)
    if not isinstance(found, str):
        has = ", ".join(row.fields) or "none"
        raise UserError(f"{row.where}: lacks a column {' or '.join(names)} (it has {has})")
    if not found.strip() and not blank:
        raise UserError(f"{row.where}: empty {next(iter(names))}; remove the row")
    return found.strip()


def finite_number(where: str, text: str, name: str = "") -> float:
    """The finite number that a text is. Raises UserError naming the row, and the column if said."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        said = f"the {name} {text!r}" if name else repr(text)
        raise UserError(f"{where}: got {said}; expected a number")
    return found


def spaced(rows: list[Row], most: int | None) -> list[Row]:
    """At most `most` rows, evenly spaced: the first rows of a grouped set are a biased sample."""
    if most is None or most >= len(rows):
        return rows
    return [rows[index * len(rows) // most] for index in range(most)]


def held_out(items: list[Item], count: int, key: str) -> tuple[list[Item], list[Item]]:
    """The items to train on, and `count` others, evenly spaced. Raises UserError naming the key."""
    if len(items) <= count:
        raise UserError(
            f"{key}: {count} of {len(items)} rows; expected fewer, so that there is something to "
            "train on"
        )
    places = {index * len(items) // count for index in range(count)}
    return (
        [item for number, item in enumerate(items) if number not in places],
        [item for number, item in enumerate(items) if number in places],
    )


def read_rows(dataset: str) -> Iterator[Row]:
    """Rows of a local .json/.jsonl/.csv/.tsv/.txt file or of a hub data set `id[:config[:split]]`.

    A .txt line is a row {"text": line}; blank lines are skipped. A .tsv knows no quoting (csv's
    default would swallow rows).
    """
    path = Path(dataset)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        yield from _hub_rows(dataset)
        return
    readers = {".json": _json, ".jsonl": _jsonl, ".txt": _lines}
    yield from readers.get(suffix, table_rows)(path, decoded(path))


def decoded(path: Path) -> str:
    """A file's text. Raises UserError where it cannot be read or is not UTF-8."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected a data file or a hub id"
        ) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from error


def _json(path: Path, text: str) -> Iterator[Row]:
    """A list of objects, as in the paper's code."""
    rows = _parsed(text, str(path))
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: got {type(rows).__name__}, expected a list of objects (one object a line is "
            ".jsonl)"
        )
    for number, fields in enumerate(rows, 1):
        yield Row(f"{path}: item {number}", _object(fields, f"{path}: item {number}"))


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield Row(where, _object(_parsed(line, where), where))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if "\n" in text else ""
        reason = f"{error.msg}, column {error.colno}"
        raise UserError(f"{where}{line}: malformed JSON ({reason})") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise UserError(f"{where}: malformed JSON ({error})") from error


def _object(fields: Any, where: str) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise UserError(
            f"{where}: got {type(fields).__name__}, expected an object such as "
            f'{{"messages": [...]}}'
        )
    return fields


def _lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Row(f"{path}:{number}", {"text": line.strip()})


def table_rows(path: Path, text: str, ragged: bool = False) -> Iterator[Row]:
    """Rows of a .csv or .tsv under its header. ragged: a row may have fewer cells, or more."""
    dialect = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if path.suffix.lower() == ".tsv"
        else {"strict": True}
    )
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)  # type: ignore[arg-type]
    csv.field_size_limit(10**9)  # a chat may be longer than csv's 131,072 characters
    header = next(reader, [])
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: malformed row ({error})") from error
        if not cells:
            continue
        if len(cells) != len(header) and not ragged:
            raise UserError(
                f"{path}:{reader.line_num}: got {len(cells)} columns, expected {len(header)} "
                f"({', '.join(header)})"
            )
        yield Row(f"{path}:{reader.line_num}", dict(zip(header, cells, strict=False)))


def _hub_rows(dataset: str) -> Iterator[Row]:
    name, _, rest = dataset.partition(":")
    config, _, split = rest.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or Path(name).exists():
        raise UserError(f"{dataset}: expected a hub id, or a file ending in {', '.join(SUFFIXES)}")
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{dataset}: cannot be had ({reason}); check the id[:config[:split]] and the network"
        ) from error
    for number, fields in enumerate(rows):
        yield Row(f"{dataset}: row {number}", fields)


def _text(row: Row) -> Text:
    if "messages" in row.fields:
        return Text(row.where, _messages(row))
    text = row.fields.get("text")
    if not isinstance(text, str):
        raise UserError(
            f"{row.where}: has no messages and no text (its fields: "
            f"{', '.join(row.fields) or 'none'})"
        )
    if not text.strip():
        raise UserError(f"{row.where}: empty text; remove the row")
    return Text(row.where, text)


def _messages(row: Row) -> list[dict[str, str]]:
    messages = row.fields["messages"]
    if isinstance(messages, str):  # a table keeps them as JSON
        messages = _parsed(messages, row.where)
    good = isinstance(messages, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("role"), str)
        and isinstance(each.get("content"), str)
        for each in messages
    )
    if not good or not messages:
        raise UserError(
            f'{row.where}: messages must be a list of {{"role": text, "content": text}}, not '
            f"{str(messages)[:60]!r}"
        )
    if not any(each["content"].strip() for each in messages):
        raise UserError(f"{row.where}: empty text in every message; remove the row")
    return [{"role": each["role"], "content": each["content"]} for each in messages]
