"""The one kind of error that a user can mend, and how it names things."""

import json
import re
from collections.abc import Sequence
from typing import Any

SHOWN = 60  # characters of a value in a message
# Python's own words, which say nothing to who wrote the file.
INTERNAL = re.compile(
    r"NoneType|<class|object has no|not subscriptable|not iterable|unhashable|PathLike|"
    r"\b(?:str|int|float|bool|bytes|dict|list|tuple|set|object)\b['\"(]|"
    r"indices must be|index out of range|to unpack|non-iterable|update sequence|-like object|"
    r"must be (?:str|real number)\b|\bnot (?:str|int|float|bool|bytes|dict|list|tuple|set)\b|"
    r"\bexpected \w+ instance|can only concatenate|as an integer|"
    r"(?:positional|keyword) argument|\b[A-Z]\w*(?:Error|Exception)\b"
)


class UserError(ValueError):
    """Something the user can mend, said in one line: what, where, and what would be right."""


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shown(value: Any) -> str:
    """A value in the words of JSON and YAML, in one line of at most 60 characters."""
    try:
        said = repr(value) if isinstance(value, str) else _json(value)
    except (ValueError, TypeError, RecursionError):
        return "a value that is too large or too deeply nested"
    return said if len(said) <= SHOWN else said[: SHOWN - 3] + "..."


def _json(value: Any) -> str:
    said = json.dumps(value, ensure_ascii=False, default=str)
    return said if said.isprintable() else json.dumps(value, default=str)


def error_reason(error: BaseException, most: int = 300) -> str:
    """A library's error message for people, in one line."""
    said = " ".join(str(getattr(error, "strerror", None) or error).split())
    if isinstance(error, KeyError):
        return f"{said[:most]} is missing"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not said or INTERNAL.search(said):
        return "something in it is missing or of an unexpected kind"
    return said[:most]
