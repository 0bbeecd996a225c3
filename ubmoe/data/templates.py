"""Chat templates, on one date, without chance and within bounds: they are programs of strangers.

transformers gives a template today's date, and the same chat is another text tomorrow. Whoever
renders one, we or another library, does it by transformers' compiler, which hands out ours once
`install` was called. transformers is imported there alone, so that a run can say its date at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import cache, partial
from typing import Any

from ubmoe.bounds import limited
from ubmoe.config import DataSection

SECONDS, MEMORY = 10.0, 2**30  # of compiling a template, or of one chat
DEFAULT = DataSection().template_date
CHANCE = ("random", "lipsum")  # what Jinja has that gives something else each time
_date: ContextVar[str] = ContextVar("date", default=DEFAULT)


@contextmanager
def dated(date: str) -> Iterator[None]:
    """Inside, it is that day, as `2024-07-26`, for every chat template."""
    token = _date.set(date)
    try:
        yield
    finally:
        _date.reset(token)


@cache
def install() -> None:
    """Have every template that transformers renders rendered by `Template`."""
    from transformers.utils import chat_template_utils as library

    compiled: Any = library._compile_jinja_template
    library._compile_jinja_template = cache(lambda source: Template(compiled, source))


class Template:
    """A compiled template that knows one date and ends in bounded time.

    Templates of Llama 3 take a `date_string` and have a default for it: they are given one where
    the date is not the default. Raises TimeoutError and MemoryError.
    """

    def __init__(self, compiled: Callable[[str], Any], source: str) -> None:
        with limited(SECONDS, MEMORY):
            self.compiled = compiled(source)
        self.environment = self.compiled.environment
        self.environment.globals["strftime_now"] = _strftime
        for name in CHANCE:  # the same chat would be another text in the next run
            for known in (self.environment.globals, self.environment.filters):
                if name in known:
                    known[name] = partial(_by_chance, name)

    def render(self, **given: Any) -> str:
        if _date.get() != DEFAULT:
            given = {"date_string": _strftime("%d %b %Y")} | given
        with limited(SECONDS, MEMORY):
            return str(self.compiled.render(**given))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compiled, name)


def _by_chance(name: str, *_: Any, **__: Any) -> None:
    raise ValueError(f"it draws at random, by {name}")


def _strftime(form: str) -> str:
    return datetime.fromisoformat(_date.get()).strftime(form)
