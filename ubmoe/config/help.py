"""What --help prints: every key of the schema."""

from collections.abc import Sequence
from typing import Any, get_args

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
        if getattr(annotation, "__metadata__", None):
            return _kind(args[0])
        return " | ".join(str(arg) if isinstance(arg, str | int) else _kind(arg) for arg in args)
    return "text" if annotation is str else annotation.__name__


def help_text(program: str, purpose: str, verbs: Sequence[str] = ()) -> str:
    """Usage, then every key with its type, default, unit and meaning."""
    verb = f" {'|'.join(verbs)}" if verbs else ""
    lines = [f"usage: {program}{verb} [CONFIG] [key=value ...] [--show-config]", "", purpose, ""]
    lines += [
        f"CONFIG is a YAML file (default configs/{DEFAULT_CONFIG.name}); its key `base` names the",
        "file, from its own folder, whose keys it changes. --show-config prints all of them.",
        "Keys, with defaults:",
        "",
    ]
    for name, field in keys():
        default = field.get_default(call_default_factory=True)
        shown = "null" if default is None else default if default != "" else "''"
        unit = (field.json_schema_extra or {}).get("unit", "")  # type: ignore[union-attr]
        measured = f" [{unit}]" if unit else ""
        lines += [
            f"  {name}: {_kind(field.annotation)} = {shown}{measured}",
            f"      {field.description}",
        ]
    return "\n".join(
        [
            *lines,
            "",
            "Exit status: 0, 2 with one line on stderr for what you can mend, 130 after Ctrl-C.",
        ]
    )
