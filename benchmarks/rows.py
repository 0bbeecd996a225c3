"""Seconds and memory of reading a thousand chats, and all, of a hub's set of a million.

python -m benchmarks.rows

A synthetic set of short chats, already on the disk as `datasets` keeps it. Each way reads it once
in a process of its own. `ours` is `read_texts`, which takes the chosen rows alone from the table;
`list first` makes objects of every row and then chooses, as this package did before. The memory is
the resident set, mapped pages of the table included, above that of a process that has loaded the
set and read nothing (`loaded`). Both must read the same texts. There is no claim.
"""

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow as pa
from pyarrow import parquet

from benchmarks.common import last_line_of_child, write
from ubmoe.data.messages import messages
from ubmoe.data.rows import Row, Text, read_texts, spaced
from ubmoe.recording import peak_memory_bytes

ROWS, PIECE, SAMPLE = 1_000_000, 50_000, 1000
WORDS = ["a", "dog", "saw", "the", "small", "cat", "and", "ran"]
TURNS, WORDS_A_TURN = ("user", "assistant") * 2, 18  # some 300 characters a chat
NAME = "synthetic/chats"
MEGABYTE = 1e6
Table = Any
load_dataset = datasets.load_dataset  # the true one: `ours` is shown a stand-in


def chat(number: int) -> list[dict[str, str]]:
    """Turns whose words hold the chat's number."""
    return [
        {
            "role": role,
            "content": " ".join(
                [
                    str(number),
                    *(WORDS[(number + turn * place) % 8] for place in range(WORDS_A_TURN)),
                ]
            ),
        }
        for turn, role in enumerate(TURNS, 1)
    ]


def make(path: Path) -> None:
    """The set as a parquet file, a piece at a time."""
    schema = pa.Table.from_pylist([{"messages": chat(0)}]).schema
    with parquet.ParquetWriter(path, schema) as file:
        for start in range(0, ROWS, PIECE):
            piece = [{"messages": chat(number)} for number in range(start, start + PIECE)]
            file.write_table(pa.Table.from_pylist(piece, schema))


def table(folder: Path) -> Table:
    """The set as `datasets` keeps it: converted once, mapped from the disk afterwards."""
    files, cache = str(folder / "chats.parquet"), str(folder / "cache")
    return load_dataset("parquet", data_files=files, cache_dir=cache, split="train")


def ours(folder: Path, most: int) -> list[Text]:
    datasets.load_dataset = lambda *_, **__: table(folder)
    return read_texts(NAME, most)


def list_first(folder: Path, most: int) -> list[Text]:
    rows = [Row(f"{NAME}: row {number}", fields) for number, fields in enumerate(table(folder))]
    return [
        Text(row.where, messages(row.where, row.fields["messages"])) for row in spaced(rows, most)
    ]


def loaded(folder: Path, _: int) -> list[Text]:
    table(folder)
    return []


WAYS: dict[str, Callable[[Path, int], list[Text]]] = {
    "loaded": loaded,
    "ours": ours,
    "list first": list_first,
}


def once(way: str, folder: Path, most: int) -> str:
    """Seconds of the clock and of the processor, peak memory in bytes, texts, their digest."""
    start, busy = time.perf_counter(), time.process_time()
    texts = WAYS[way](folder, most)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = peak_memory_bytes()
    digest = hashlib.sha256()
    for text in texts:
        digest.update(repr((text.where, text.content)).encode())
    return f"{seconds} {busy} {peak} {len(texts)} {digest.hexdigest()[:8]}"


def measured(way: str, folder: Path, most: int) -> dict[str, Any]:
    line = last_line_of_child("benchmarks.rows", way, folder, most)
    seconds, busy, peak, texts, digest = line.split()
    megabytes = int(peak) / MEGABYTE
    row: dict[str, Any] = {"way": way, "texts": int(texts), "seconds": float(seconds)}
    return row | {"processor_s": float(busy), "MB": megabytes, "digest": digest}


def main() -> None:
    if len(sys.argv) > 1:  # a child: one way, once
        way, place, most_texts = sys.argv[1:]
        print(once(way, Path(place), int(most_texts)))
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "chats.parquet")
        table(folder)
        rows = [measured("loaded", folder, 0)]
        for most in (SAMPLE, ROWS):
            both = [measured(way, folder, most) for way in ("ours", "list first")]
            if both[0]["digest"] != both[1]["digest"]:
                raise SystemExit(f"the texts differ: {both}")
            rows += both
    for row in rows:
        row["above_MB"] = row["MB"] - rows[0]["MB"]
    settings = {"rows": ROWS, "characters": sum(len(turn["content"]) for turn in chat(ROWS // 2))}
    write("rows", rows, settings=settings)


if __name__ == "__main__":
    main()
