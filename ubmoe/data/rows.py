"""Chats and texts of a hub id, a local file or the embedded language; complaints name the line."""

import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ubmoe.bounds import DATA, read_bytes, regular
from ubmoe.config import UserError, error_reason, shown
from ubmoe.data.bad_rows import RowError, usable
from ubmoe.data.messages import (
    CHATS,
    LONGEST,
    SHAREGPT,
    Message,
    bounded,
    check_unicode,
    messages,
    parsed,
    tools,
)
from ubmoe.tiny import language

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
GZIPPED = ".gz"  # may follow the suffixes of texts
TINY_CHATS = 400  # held out of the embedded language
TINY_HELD_OUT_SEED = 1  # unlike the seed that the embedded model was trained with
TINY_SENTENCES, TINY_SENTENCES_SEED = 8000, 3
Item = TypeVar("Item")
# As everybody writes one: Python also takes 1_0, infinity and the digits of other scripts.
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
SENTENCE = ("text", "sentence")  # what the column of sentences is called


@dataclass(frozen=True)
class Row:
    """One row of a data set: its fields, and where it stands (`file:line`) for complaints."""

    where: str
    fields: dict[str, Any]


class HubRows:
    """Chosen rows of a hub's data set, each read from its table when it is its turn."""

    def __init__(self, dataset: str, table: Any, places: Sequence[int]) -> None:
        self.dataset, self.table, self.places = dataset, table, places

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Row]:
        whole = len(self.places) == len(self.table)  # then faster read in its order
        fields = self.table if whole else (self.table[place] for place in self.places)
        for place, field in zip(self.places, fields, strict=True):
            yield Row(f"{self.dataset}: row {place}", field)


Rows = Sequence[Row] | HubRows


@dataclass(frozen=True)
class Text:
    """A language model's text: chat messages and the tools they may call, or plain text."""

    where: str
    content: list[Message] | str
    tools: list[dict[str, Any]] | None = None

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.content, str)


def read_texts(dataset: str, most: int | None = None) -> list[Text]:
    """Rows with `messages` or `conversations` (chats), or `text`, at most `most` of them.

    They are spaced evenly over the data. Raises UserError for a missing, empty or malformed data
    set, naming file and line.
    """
    if dataset == "tiny":
        chats = language.chats(min(most or TINY_CHATS, TINY_CHATS), seed=TINY_HELD_OUT_SEED)
        return [Text(f"tiny:{number}", chat["messages"]) for number, chat in enumerate(chats, 1)]
    rows = chosen_rows(dataset, most)
    if not rows:
        raise UserError(f"{dataset}: empty; expected rows with messages or text")
    return left(dataset, list(usable(_text, rows)), len(rows))


def training_rows(dataset: str, most: int | None = None) -> Rows:
    """Rows to train on, at most `most` of them; for the word tiny, sentences of the language."""
    if dataset != "tiny":
        return chosen_rows(dataset, most)
    sentences = language.sentences(
        min(most or TINY_SENTENCES, TINY_SENTENCES), seed=TINY_SENTENCES_SEED
    )
    return [Row(f"tiny:{number}", {"text": text}) for number, text in enumerate(sentences, 1)]


def chosen_rows(dataset: str, most: int | None = None) -> Rows:
    """At most `most` rows of a file or a hub's data set, evenly spaced over those that count.

    Of a file the rows that can be parsed count. Of a hub's data set all count, and the chosen ones
    alone are read. What a row holds is checked after the choice: one dropped then is not replaced.
    """
    if is_file(dataset):
        return spaced(list(read_rows(dataset)), most)
    table = _hub_table(dataset)
    return HubRows(dataset, table, spaced(range(len(table)), most))


def left(dataset: str, items: list[Item], of: int) -> list[Item]:
    """The rows that are left of `of`. Raises UserError where all of them were dropped."""
    if of and not items:
        raise UserError(f"{dataset}: none of its {of} rows can be used; see the ones dropped above")
    return items


def given(row: Row, names: Iterable[str]) -> Any:
    """The first of the named columns that holds anything: a list of one is its one item."""
    value = next((row.fields[name] for name in names if row.fields.get(name) is not None), None)
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def cell(row: Row, names: Iterable[str], blank: bool = False) -> str:
    """The text of the first of the named columns that is there. Raises RowError."""
    names = list(names)
    value = given(row, names)
    there = [name for name in names if name in row.fields]
    if not there:
        has = _listed(row.fields)
        raise RowError(row.where, f"lacks a column {' or '.join(names)} (it has {has})")
    if isinstance(value, list) and value:
        raise RowError(
            row.where,
            f"{there[0]} is a list of {len(value)}; expected one text: write a row for each",
        )
    if not isinstance(value, str):
        what = "null" if value is None else repr(value)[:60]
        raise RowError(row.where, f"{there[0]} is {what}; expected a text")
    if not value.strip() and not blank:
        raise RowError(row.where, f"empty {there[0]}; remove the row")
    return value.strip()


def finite_number(where: str, text: str, name: str = "") -> float:
    """The finite number that a text is. Raises RowError, naming the column if said."""
    number = float(text) if NUMBER.fullmatch(text.strip()) else math.nan
    if not math.isfinite(number):
        said = f"the {name} {text!r}" if name else repr(text)
        raise RowError(where, f"got {said}; expected a number")
    return number


def spaced(rows: Sequence[Item], most: int | None) -> Sequence[Item]:
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


def read_rows(dataset: str, ragged: bool = False) -> Iterator[Row]:
    """Rows of a local file of `SUFFIXES`, gzipped or not, or of a hub's `id[:config[:split]]`.

    A .txt line is a row {"text": line}; blank lines are skipped. A .tsv knows no quoting (csv's
    default would swallow rows). ragged: a table's row may have fewer cells than its header.
    """
    path, suffix = Path(dataset), suffix_of(dataset)
    if not is_file(dataset):
        yield from chosen_rows(dataset)
    elif suffix == ".parquet":
        yield from _parquet(path)
    elif suffix in (".csv", ".tsv"):
        yield from table_rows(path, decoded(path), ragged)
    else:
        readers = {".json": _json, ".jsonl": _jsonl, ".txt": _lines}
        yield from readers[suffix](path, decoded(path))


def is_file(dataset: str) -> bool:
    """Whether a name is of a local data file, here or not."""
    return suffix_of(dataset) in SUFFIXES


def suffix_of(dataset: str | Path) -> str:
    """The suffix that says how a file is read: of a.jsonl.gz it is .jsonl."""
    return Path(str(dataset).lower().removesuffix(GZIPPED)).suffix


def _parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file, a group of them at a time. Raises UserError where it is none."""
    from pyarrow import ArrowException, parquet

    def numbered() -> Iterator[tuple[str, Any]]:
        number = 0
        with regular(path, DATA).open("rb") as file, parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", fields

    try:
        yield from usable(lambda line: _object(*line), numbered())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error_reason(error)}); expected a Parquet file"
        ) from error
    except ArrowException as error:
        raise UserError(f"{path}: no Parquet file ({error_reason(error)})") from error


def decoded(path: Path) -> str:
    """A file's text. Raises UserError where it cannot be read or is not UTF-8."""
    try:
        raw = read_bytes(path, DATA)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected a data file or a hub id"
        ) from error
    if path.suffix.lower() == GZIPPED:
        raw = _unzipped(path, raw)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from error


def _unzipped(path: Path, raw: bytes) -> bytes:
    """The contents of a gzipped file, up to the largest size allowed. Raises UserError."""
    try:
        with gzip.open(io.BytesIO(raw)) as file:
            text = file.read(DATA + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: no gzip file ({error_reason(error)})") from error
    if len(text) > DATA:
        raise UserError(f"{path}: holds more than {DATA >> 30} GiB; expected a smaller file")
    return text


def _json(path: Path, text: str) -> Iterator[Row]:
    """A list of objects, as in the paper's code."""
    rows = parsed(text, str(path))
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: got {shown(rows)}, expected a list of objects (one object a line is .jsonl)"
        )
    numbered = ((f"{path}: item {number}", fields) for number, fields in enumerate(rows, 1))
    return usable(lambda line: _object(*line), numbered)


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    lines = ((f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1))
    return usable(
        lambda line: _object(line[0], parsed(bounded(*line), line[0])),
        (line for line in lines if line[1].strip()),
    )


def _object(where: str, fields: Any) -> Row:
    if not isinstance(fields, dict):
        raise RowError(
            where,
            f'got {shown(fields)}, expected an object such as {{"messages": [...]}}',
        )
    check_unicode(where, fields)
    return Row(where, fields)


def _lines(path: Path, text: str) -> Iterator[Row]:
    lines = ((f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1))
    return usable(
        lambda line: Row(line[0], {"text": bounded(*line).strip()}),
        (line for line in lines if line[1].strip()),
    )


def table_rows(path: Path, text: str, ragged: bool = False) -> Iterator[Row]:
    """Rows of a .csv or .tsv under its header. ragged: a row may have fewer cells.

    A row with more is refused: a stray tab or comma would move a sentence into another column.
    """
    (first, header), *rows = list(_cells(path, text)) or [("", [])]
    header = [name.strip() for name in header]
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise UserError(f"{first}: two columns are called {twice[0]}; expected a name for each")

    def named(row: tuple[str, list[str]]) -> Row:
        where, cells = row
        if len(cells) > len(header) or (len(cells) < len(header) and not ragged):
            stray = "; is there a stray tab?" if suffix_of(path) == ".tsv" else ""
            raise RowError(
                where,
                f"got {len(cells)} columns, expected {len(header)} ({', '.join(header)}){stray}",
            )
        return Row(where, dict(zip(header, cells, strict=False)))

    return usable(named, rows)


def _cells(path: Path, text: str) -> Iterator[tuple[str, list[str]]]:
    """(file:line, cells) of each row that has any. Raises UserError for an open quote."""
    csv.field_size_limit(LONGEST)  # a chat may be longer than csv's 131,072 characters
    tabs: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    is_tsv = suffix_of(path) == ".tsv"
    reader = csv.reader(io.StringIO(text, newline=""), **(tabs if is_tsv else {"strict": True}))
    while True:
        where = f"{path}:{reader.line_num + 1}"  # where the row begins: a cell may hold lines
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{where}: malformed row ({error}); is a quote not closed?") from error
        if cells:
            yield where, cells


def _hub_table(dataset: str) -> Any:
    """The data set, on the disk: a row becomes objects when it is asked for."""
    name, _, rest = dataset.partition(":")
    config, _, split = rest.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or Path(name).exists():
        raise UserError(f"{dataset}: expected a hub id, or a file ending in {', '.join(SUFFIXES)}")
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        reason = error_reason(error)
        raise UserError(
            f"{dataset}: cannot be loaded ({reason}); check the id[:config[:split]] and the network"
        ) from error


def _listed(fields: Iterable[str]) -> str:
    """Names of fields, in one line whatever is in them."""
    return ", ".join(name if name.isprintable() else repr(name) for name in fields) or "none"


def _text(row: Row) -> Text:
    fields = row.fields
    name = next((name for name in CHATS if fields.get(name) is not None), None)
    if name is not None:
        system = fields.get("system") if name == SHAREGPT else None
        turns = messages(row.where, fields[name], system)
        return Text(row.where, turns, tools(row.where, fields.get("tools")))
    text = fields.get("text")
    if not isinstance(text, str):
        raise RowError(
            row.where,
            f"has no messages and no text (its fields: {_listed(fields)})",
        )
    if not text.strip():
        raise RowError(row.where, "empty text; remove the row")
    return Text(row.where, text)
