"""A YAML file and `key=value` overrides, read into one strict, frozen configuration."""

import re
from collections.abc import Sequence
from copy import deepcopy
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ubmoe.bounds import expanded, read_text
from ubmoe.config.errors import UserError, shown
from ubmoe.config.schema import Config, keys, numbered, section_of
from ubmoe.config.strict_yaml import parsed

CHECKOUT = Path(__file__).parents[2] / "configs"
CONFIGS = CHECKOUT if (CHECKOUT / "tiny.yaml").is_file() else Path(__file__).parents[1] / "configs"
DEFAULT_CONFIG = CONFIGS / "tiny.yaml"
EXPECTED_CONFIG = f"expected a YAML file such as configs/{DEFAULT_CONFIG.name}"


def shipped(path: str | Path) -> Path:
    """A file as it is named; of this repository's configs/, wherever one is, where it is not."""
    path = Path(path)
    if not path.exists() and path.parts[:1] == ("configs",):
        inside = CONFIGS.joinpath(*path.parts[1:])
        return inside if inside.is_file() else path
    return path


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and `key=value` overrides into one frozen, resolved configuration.

    Raises UserError, in one line, with every problem of the file (or else of the command line).
    """
    path = shipped(path or DEFAULT_CONFIG)
    tree = _with_base(path)
    config = validated(tree, str(path))
    config = _overridden(tree, overrides or [])
    if config.output_dir.startswith("~"):  # no shell has written it out behind a =
        return config.model_copy(update={"output_dir": str(expanded(config.output_dir))})
    if config.output_dir:
        return config
    return config.model_copy(update={"output_dir": f"runs/{path.stem}"})


def with_keys(config: Config, overrides: list[str]) -> Config:
    """The configuration with `key=value` over it. Raises UserError."""
    return _overridden(config.model_dump(), overrides)


# Keys that another one, given on the command line, replaces where the file has them.
REPLACED = {"bi.form": ("prompt", "pooling", "prompt_in_mean")}


def _overridden(tree: dict[str, Any], overrides: list[str]) -> Config:
    given = dict(text.partition("=")[::2] for text in overrides)
    for name, replaced in REPLACED.items():
        section = tree.get(name.split(".")[0])
        if isinstance(section, dict) and given.get(name, "null") != "null":
            for key in replaced:
                section.pop(key, None)
    problems = [problem for text in overrides if (problem := _override(tree, text))]
    if problems:
        raise UserError("command line: " + "; ".join(problems))
    return validated(tree, "command line")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back equal."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


BASE = "base"  # names the file that a file changes, from its own folder


def _with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's keys over those of its base, and so on. Raises UserError."""
    tree = _read_yaml(path)
    if BASE not in tree:
        return tree
    base, above = tree.pop(BASE), (*above, path.resolve())
    if not isinstance(base, str) or "\0" in base:
        raise UserError(f"{path}: base: got {shown(base)}, expected the path of a YAML file")
    below = path.parent / expanded(base)
    if not below.is_file():
        raise UserError(f"{path}: base: {below} is no file; expected one, from {path.parent} on")
    if below.resolve() in above:
        names = " -> ".join(file.name for file in (*above, below))
        raise UserError(f"{path}: base: {names} is circular; expected a base that ends somewhere")
    return _changed(_drop_replaced(_with_base(below, above), tree), tree)


def _drop_replaced(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """The base without the keys that a key of the file replaces."""
    for name, replaced in REPLACED.items():
        section, key = name.split(".")
        upper, below = tree.get(section), base.get(section)
        if isinstance(upper, dict) and upper.get(key) is not None and isinstance(below, dict):
            base = base | {section: {n: value for n, value in below.items() if n not in replaced}}
    return base


def _changed(base: Any, upper: Any) -> Any:
    """Sections go into each other; so do a mapping of numbers and the list whose items it changes.

    Any other value stands in place of the base's.
    """
    if (
        isinstance(base, list)
        and isinstance(upper, dict)
        and upper
        and upper.keys() <= {*range(len(base))}
    ):
        return [_changed(item, upper[n]) if n in upper else item for n, item in enumerate(base)]
    if not (isinstance(base, dict) and isinstance(upper, dict)):
        return upper
    return base | {name: _changed(base.get(name), value) for name, value in upper.items()}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = parsed(read_text(path))
    except OSError as error:
        known = CONFIGS / f"{path.stem}.yaml"
        expected = f"did you mean configs/{known.name}?" if known.is_file() else EXPECTED_CONFIG
        raise UserError(f"{path}: cannot be read ({error.strerror}); {expected}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); expected a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())[:200]
        raise UserError(f"{path}{line}: not YAML ({problem})") from error
    if not isinstance(tree, dict | None):
        raise UserError(
            f"{path}: got {shown(tree)}, expected sections such as model: and dependence:"
        )
    sections = {name for name, field in Config.model_fields.items() if section_of(field)}
    # A section whose keys are all commented out reads as null and means: the defaults.
    return {
        name: {} if value is None and name in sections else value
        for name, value in (tree or {}).items()
    }


def _override(tree: dict[str, Any], text: str) -> str | None:
    """Set one dotted `key=value` in the file's tree; return what is wrong with it, if anything.

    The tree holds only what was said, so that what was not keeps the default of its stage.
    """
    name, equals, raw = text.partition("=")
    if not equals or name.startswith("-"):
        return f"{text!r} is not key=value, such as dependence.max_texts=100"
    try:
        value = parsed(raw)
    except (yaml.YAMLError, ValueError):
        value = raw  # a Jinja template is no YAML
    *parents, last = name.split(".")
    if numbered(name).removesuffix(".N") not in _names():
        return f"{name}: unknown key; {_nearest(name)}"
    node: Any = tree
    default: Any = _defaults()
    for place, part in enumerate(parents, 1):
        default = default.get(part) if isinstance(default, dict) else None
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = deepcopy(default) if isinstance(default, list) else {}
        if (slot := _slot(node, part)) is None:
            return f"{name}: unknown key; {_known(name, node, parents[: place - 1])}"
        node = node[slot]
        if not isinstance(node, dict | list):
            expected = "a list" if isinstance(default, list) else "a section of keys"
            return f"{'.'.join(parents[:place])}: got {shown(node)}, expected {expected}"
    if (slot := _slot(node, last) if isinstance(node, list) else last) is None:
        return f"{name}: unknown key; {_known(name, node, parents)}"
    node[slot] = value
    return None


@cache
def _defaults() -> dict[str, Any]:
    return Config().model_dump()


@cache
def _names() -> frozenset[str]:
    """Every dotted name: of sections, of keys, and of the keys of a list's items."""
    names = [dotted.split(".") for dotted, _ in keys()]
    return frozenset(".".join(parts[:end]) for parts in names for end in range(1, len(parts) + 1))


def _slot(node: Any, part: str) -> str | int | None:
    """Where `part` of a dotted name stands in a mapping or a list; None where there is no place."""
    is_number = re.fullmatch("[0-9]{1,9}", part) is not None
    if isinstance(node, list) and is_number and int(part) < len(node):
        return int(part)
    return part if isinstance(node, dict) and part in node else None


def validated(tree: dict[str, Any], source: str) -> Config:
    """A tree of sections as the configuration. Raises UserError, naming the source and the keys."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_problems(error, tree))) from None


EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_too_short": "a text that is not empty",
    "string_unicode": "text without NUL and halves of surrogate pairs",
    "list_type": "a list",
    "dict_type": "keys with values",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "invalid_key": "a text as key",
    "missing": "a value; it has no default",
}


def _problems(error: ValidationError, tree: dict[str, Any]) -> list[str]:
    """A line for each key that is wrong: what it could have been instead, in one."""
    expected: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    leaves = dict(keys())
    for problem in error.errors():
        kind, value, name = problem["type"], problem["input"], _place(problem["loc"], tree)
        of_a_section = kind == "value_error" and isinstance(value, dict)
        if kind == "missing":
            name = f"{name}.{problem['loc'][-1]}"
        elif kind != "extra_forbidden" and not (of_a_section and numbered(name) not in leaves):
            values[name] = value
        said = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        if kind in EXPECTED:
            said = f"expected {EXPECTED[kind]}"
        elif kind == "extra_forbidden":
            said = f"unknown key; {_nearest(name)}"
        expected.setdefault(name, []).append(said)
    # Of what may be one thing or another, the one that got furthest says what is wrong.
    inner = [
        name for name in expected if not any(known.startswith(f"{name}.") for known in expected)
    ]
    return [
        f"{name}: "
        + (f"got {shown(values[name])}, " if name in values else "")
        + " or ".join(dict.fromkeys(expected[name])).replace(" or expected ", " or ")
        for name in inner
    ]


def _place(parts: Sequence[Any], tree: Any) -> str:
    """The dotted name of what pydantic means, without the kinds that it tried there."""
    names = []
    for part in parts:
        there = range(len(tree)) if isinstance(tree, list) else tree
        if isinstance(tree, list | dict) and part in there:
            names.append(str(part))
            tree = tree[part]
    return ".".join(names)


MOVED = {
    "results.action": "it is a word now: python -m ubmoe.results plan, run, table, figure, record, "
    "readme or prefetch, then CONFIG and keys",
}


def _known(name: str, node: Any, parents: Sequence[str]) -> str:
    """What there is in place of an unknown key, or of an unknown item of a list."""
    if not isinstance(node, list):
        return _nearest(name)
    where = ".".join(parents)
    return f"the last item of {where} is {len(node) - 1}" if node else f"{where} has no items"


def _nearest(name: str) -> str:
    if name in MOVED:
        return MOVED[name]
    known = [dotted for dotted, _ in keys()]
    close = get_close_matches(name, known, 1, 0.75) if "." in name else []
    if not close:
        lasts = {dotted.rpartition(".")[2] for dotted in known}
        nearest = get_close_matches(name.rpartition(".")[2], sorted(lasts), 1, 0.6)
        close = [dotted for dotted in known if dotted.rpartition(".")[2] in nearest]
    return f"did you mean {' or '.join(close)}?" if close else "see --help for all keys"
