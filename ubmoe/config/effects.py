"""Which keys a result depends on: what a key can change is said at the key, in the schema."""

import json
from collections.abc import Iterable
from typing import Any

from ubmoe.config.schema import BiSection, Section, affects, keys, numbered

FORM = tuple(f"bi.{name}" for name in BiSection.model_fields if name != "stages")
DATE = "data.template_date"  # of chats
CHATS = (DATE, *(f"ubmoe.{name}" for name in ("dataset", "max_rows", "held_out", "max_tokens")))
ASKED = tuple(
    f"evaluation.{name}" for name in ("num_fewshot", "limit", "apply_chat_template", "bf16", "data")
)
# Of the encoder's form, what a scan does not choose itself.
SCANNED = tuple(
    key for key in FORM if key.split(".")[1] not in ("attention", "layers", "pooling", "whiten")
)
# Sections and keys of how a model is scored, by the result that says it; and of how it was made.
SCORED = {
    "evaluation": ("model", *FORM, "evaluation", *CHATS),
    "generation": ("model", *FORM, "evaluation", *CHATS),
    "sts": ("model", *FORM, "evaluation.sts", "evaluation.bf16", "trajectory"),
    "dependence": ("model", "dependence", "bi.layers", "bi.keep_sink", DATE),
    "bitune": ("model", "bitune", *ASKED, DATE),
    "swap": ("model", "ubmoe.bi", *CHATS, "swap", "evaluation.bf16"),
    "shift": ("model", "ubmoe.bi", *CHATS, "shift", "evaluation.bf16"),
    "scan": ("model", *SCANNED, "scan", "evaluation.bf16"),
    "probing": ("model", "probing"),
}
MADE = {"sts": ("model", *FORM, "bi.stages", DATE), "generation": ("model", "ubmoe", DATE)}
MISSING = object()


# Keys that locate a file: runs differ by its contents, whatever its path.
PLACES = ("dataset", "lm_dataset", "sentences", "bi")


def deciding_weights(section: Section) -> dict[str, Any]:
    """The settings of a section that decide the trained weights: a run resumes if no other changes.

    Where the data lie is left out: their digest stands beside these keys.
    """
    fields = type(section).model_fields
    return {
        name: value
        for name, value in section.model_dump().items()
        if affects(fields[name]) == "weights" and name not in PLACES
    }


def leaves(config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """{dotted key: value as text} below some sections and keys of a dumped configuration.

    0.0 is 0; keys that affect nothing are left out, and so is what the configuration lacks.
    """
    flat: dict[str, str] = {}
    for name in names:
        value: Any = config
        for part in name.split("."):
            value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
        flat |= {} if value is MISSING else _leaves(value, name)
    return flat


def _leaves(value: Any, name: str) -> dict[str, str]:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(place): item for place, item in enumerate(value)}
    if isinstance(value, dict):
        flat: dict[str, str] = {}
        for part, item in value.items():
            flat |= _leaves(item, f"{name}.{part}")
        return flat
    if numbered(name) in WITHOUT_EFFECT:
        return {}
    whole = isinstance(value, float) and value.is_integer()
    return {name: json.dumps(int(value) if whole else value)}


def default(name: str) -> str | None:
    """A key's, as `leaves` says it; None where it has none."""
    field = FIELDS.get(numbered(name))  # none: of a part of a value
    if field is None or field.is_required():
        return None
    return _leaves(field.get_default(call_default_factory=True), name).get(name)


def unlike(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The dotted keys in which two dumped configurations, or marks of runs, differ."""
    old, new = leaves(before, before), leaves(now, now)
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


FIELDS = dict(keys())
WITHOUT_EFFECT = {name for name, field in FIELDS.items() if affects(field) == "nothing"}
