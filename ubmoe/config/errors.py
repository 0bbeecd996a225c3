"""The one kind of error that a user can mend, and how it names things."""

from collections.abc import Sequence


class UserError(ValueError):
    """Something the user can mend, said in one line: what, where, and what would be right."""


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
