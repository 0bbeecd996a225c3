"""The text of --help: the keys of a program, or every key of the schema."""

import json
from collections.abc import Sequence
from typing import Any, get_args

from pydantic.fields import FieldInfo

from ubmoe.config.reading import DEFAULT_CONFIG
from ubmoe.config.schema import Section, keys


def _kind(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    if args := get_args(annotation):
        if getattr(annotation, "__origin__", None) is list:
            return f"list of {_kind(args[0])}".replace("section", "sections")
        if getattr(annotation, "__origin__", None) is dict:
            return f"{{{': '.join(map(_kind, args))}}}"
        if getattr(annotation, "__metadata__", None):
            return _kind(args[0])
        return " | ".join(str(arg) if isinstance(arg, str | int) else _kind(arg) for arg in args)
    return "text" if annotation is str else annotation.__name__


# Of each program its own sections, after the keys that stand in none, the most used first.
SECTIONS = {
    "calculate_dp.py": ("model", "dependence", "data"),
    "train_bi.py": ("model", "bi", "evaluation", "trajectory", "data", "hub"),
    "train_ubmoe.py": ("model", "ubmoe", "evaluation", "data", "hub"),
    "python -m ubmoe.evaluate": ("model", "evaluation", "bi", "data"),
    "python -m ubmoe.bitune": ("model", "bitune", "evaluation", "data"),
    "python -m ubmoe.probing": ("model", "probing", "data"),
    "python -m ubmoe.scan": ("model", "scan", "bi", "data"),
    "python -m ubmoe.swap": ("model", "swap", "ubmoe", "data"),
    "python -m ubmoe.shift": ("model", "shift", "ubmoe", "data"),
    "python -m ubmoe.results": ("results", "model"),
    "python -m ubmoe.prefetch": ("model", "evaluation", "data"),
}
ALL = "--help all"


def help_text(
    program: str, purpose: str, verbs: Sequence[str] = (), everything: bool = True, name: str = ""
) -> str:
    """Usage, then keys with their types, defaults, units and meanings.

    everything: the keys of every program, else those of this one. name: how it was called, where
    that is not the program's own name.
    """
    verb = f" {'|'.join(verbs)}" if verbs else ""
    every, said = list(keys()), name or program
    sections = () if everything else SECTIONS.get(program, ())
    of_program = [
        entry
        for section in ("", *sections)
        for entry in every
        if section == (entry[0].partition(".")[0] if "." in entry[0] else "")
    ]
    shown = of_program if sections else every
    lines = [f"usage: {said}{verb} [CONFIG] [key=value ...] [--show-config]", "", purpose, ""]
    lines += [
        f"CONFIG is a YAML file (default configs/{DEFAULT_CONFIG.name}). It may name another file,",
        "relative to itself, as its `base`, and hold only the keys that differ from it.",
        "--show-config prints every key with the value that a run would have.",
        "Keys, with defaults:",
        "",
    ]
    for entry in shown:
        lines += _key_lines(*entry)
    if len(shown) < len(every):
        lines += ["", f"{len(every) - len(shown)} keys are of other programs: {said} {ALL}"]
    return "\n".join(
        [
            *lines,
            "",
            "Exit status: 0, 2 with one line on stderr for what you can mend, 130 after Ctrl-C.",
        ]
    )


def _key_lines(name: str, field: FieldInfo) -> list[str]:
    unit = (field.json_schema_extra or {}).get("unit", "")  # type: ignore[union-attr]
    measured = f" [{unit}]" if unit else ""
    default = "" if field.is_required() else f" = {_default(field)}"
    return [f"  {name}: {_kind(field.annotation)}{default}{measured}", f"      {field.description}"]


def _default(field: FieldInfo) -> Any:
    default = field.get_default(call_default_factory=True)
    if isinstance(default, str) and "\n" in default:
        return json.dumps(default)  # as YAML has it, in one line
    return "null" if default is None else default if default != "" else "''"
