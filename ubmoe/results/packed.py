"""Records of a folder in two files: a JSON line each, and the numbers of single heads as arrays.

The first line says what most records share of their `config` and `environment`, by dotted keys; in
every other line these two are what differs. Floats stay to the last bit.
"""

import json
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ubmoe.bounds import METADATA, read_text, regular
from ubmoe.config import UserError, error_reason
from ubmoe.files import replace_all, write_text
from ubmoe.unfinished import WRONG

LINES, HEADS = "records.jsonl", "heads.npz"
SHARED = ("config", "environment")
Json = dict[str, Any]


def write(folder: Path, records: Mapping[str, Json]) -> None:
    """Both files, of records by their names. Raises UserError for one that cannot be packed, and
    where a file beside no records would give way.
    """
    if (folder / HEADS).exists() and not (folder / LINES).exists():
        raise UserError(f"{folder / HEADS} is beside no {LINES}, so not known to be ours; move it")
    shared = {section: _most_common(records, section) for section in SHARED}
    heads: dict[str, np.ndarray] = {}
    lines: list[Json] = [{"shared": shared}]
    for name, record in sorted(records.items()):
        line, arrays = _packed(name, record, shared)
        if _text(_unpacked(line, shared, arrays)) != _text(record):
            raise UserError(f"{folder}: {name} cannot be packed without loss; expected a result")
        lines.append(line)
        heads |= {name: arrays} if arrays is not None else {}
    text = "".join(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n" for line in lines)
    replace_all({folder / LINES: partial(write_text, text=text), folder / HEADS: _saving(heads)})


def _saving(arrays: dict[str, np.ndarray]) -> Any:
    def save(path: Path) -> None:
        with path.open("wb") as file:  # else numpy would add to the name
            np.savez(file, allow_pickle=False, **arrays)

    return save


def read(folder: Path) -> dict[str, Json]:
    """{name: record}; {} where nothing is packed. Raises UserError, naming file and line."""
    path, heads = folder / LINES, folder / HEADS
    if not path.exists():
        return {}
    times = tuple(file.stat().st_mtime_ns for file in (path, heads) if file.exists())
    return dict(_read(path, heads, times))


@lru_cache(maxsize=16)
def _read(path: Path, heads: Path, _: tuple[int, ...]) -> dict[str, Json]:
    # cached: a study reads a record for every step
    records: dict[str, Json] = {}
    number = 1
    try:
        arrays = np.load(regular(heads), allow_pickle=False) if heads.exists() else {}
        first, *rest = read_text(path, METADATA).rstrip("\n").split("\n")
        shared = json.loads(first)["shared"]
        for text in rest:
            number += 1
            line = json.loads(text)
            array = arrays[line["name"]] if "heads" in line else None
            records[line["name"]] = _unpacked(line, shared, array)
    except (*WRONG, TypeError) as error:
        raise UserError(
            f"{path}, line {number}: no packed records ({error_reason(error)}); expected what "
            "python -m ubmoe.results pack wrote, and heads.npz beside it"
        ) from error
    return records


# --- a record as a line ---------------------------------------------------------------------------


def _packed(name: str, record: Json, shared: Json) -> tuple[Json, np.ndarray | None]:
    line: Json = {"name": name} | record
    for section in SHARED:
        if section in record:
            line[section] = _overrides(_flat(record[section]), shared[section])
    layers = record.get("dependence", {}).get("layers") or []
    flat = [[_flat(head) for head in layer.get("heads", ())] for layer in layers]
    columns = list(flat[0][0]) if flat and flat[0] else []
    values = [[[head.get(name) for name in columns] for head in layer] for layer in flat]
    if not columns or not _are_floats(values):
        return line, None
    without = [{key: value for key, value in layer.items() if key != "heads"} for layer in layers]
    line["dependence"] = record["dependence"] | {"layers": without}
    return line | {"heads": columns}, np.array(values)


def _are_floats(values: Any) -> bool:
    """Whether every layer has the same number of heads, and no number is missing."""
    every = [number for layer in values for head in layer for number in head]
    return len({len(layer) for layer in values}) == 1 and all(type(x) is float for x in every)


def _unpacked(line: Json, shared: Json, heads: np.ndarray | None) -> Json:
    record = {key: value for key, value in line.items() if key not in ("name", "heads")}
    for section in SHARED:
        if section in record:
            record[section] = _nested(_overridden(shared[section], record[section]))
    if heads is not None:
        layers = [
            layer | {"heads": [_nested(dict(zip(line["heads"], row, strict=True))) for row in rows]}
            for layer, rows in zip(record["dependence"]["layers"], heads.tolist(), strict=True)
        ]
        record["dependence"] = record["dependence"] | {"layers": layers}
    return record


# --- differences from the shared keys -------------------------------------------------------------


def _most_common(records: Mapping[str, Json], section: str) -> Json:
    """The value that each dotted key has most often, of keys that more than half have."""
    sections = [_flat(record[section]) for record in records.values() if section in record]
    counts: dict[str, Counter[str]] = {}
    for flat in sections:
        for key, value in flat.items():
            counts.setdefault(key, Counter())[json.dumps(value)] += 1
    return {
        key: json.loads(values.most_common(1)[0][0])
        for key, values in counts.items()
        if 2 * values.total() > len(sections)
    }


def _overrides(flat: Json, shared: Json) -> Json:
    """The keys to set, and under `unset` the shared keys that are missing."""
    changed = {
        key: value
        for key, value in flat.items()
        if key not in shared or json.dumps(shared[key]) != json.dumps(value)
    }
    unset = [key for key in _overridden(shared, changed) if key not in flat]
    return changed | ({"unset": unset} if unset else {})


def _overridden(shared: Json, changed: Json) -> Json:
    """A key that is set stands in place of those below and above it."""
    changed = dict(changed)
    gone, below = {*changed.pop("unset", ()), *_above(changed)}, tuple(f"{key}." for key in changed)
    kept = {
        key: value for key, value in shared.items() if key not in gone and not key.startswith(below)
    }
    return kept | changed


def _above(keys: Any) -> set[str]:
    """bi and bi.stages of bi.stages.0, and so on."""
    parts = [key.split(".") for key in keys]
    return {".".join(path[:count]) for path in parts for count in range(1, len(path))}


def _flat(value: Any, at: str = "") -> Json:
    """{dotted key: value}; items of a list of sections go by their numbers."""
    items: Any = value.items() if isinstance(value, dict) else None
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        items = enumerate(value)
    if not value or items is None:
        return {at: value}
    flat: Json = {}
    for key, item in items:
        flat |= _flat(item, f"{at}.{key}" if at else str(key))
    return flat


def _nested(flat: Json) -> Any:
    tree: Json = {}
    for dotted, value in flat.items():
        *path, last = dotted.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return _lists(tree, flat)


def _lists(node: Any, leaves: Json, at: str = "") -> Any:
    """Sections by numbers as lists; a value that is itself a dict is left as it is."""
    if not isinstance(node, dict) or at in leaves:
        return node
    children = {
        key: _lists(child, leaves, f"{at}.{key}" if at else key) for key, child in node.items()
    }
    return [*children.values()] if children and all(key.isdigit() for key in children) else children


def _text(record: Json) -> str:
    return json.dumps(record, sort_keys=True)
