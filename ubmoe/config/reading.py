"""A YAML file and `key=value` overrides, read into one strict, frozen configuration."""

from copy import deepcopy
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ubmoe.bounds import read_text
from ubmoe.config.errors import UserError
from ubmoe.config.schema import Config, keys, numbered, section_of

DEFAULT_CONFIG = Path(__file__).parent.parent.parent / "configs" / "tiny.yaml"


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader keeps the last of two equal keys without a word; this one refuses."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if isinstance(name, str) and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name!r} twice", key_node.start_mark
                )
            seen.add(name if isinstance(name, str) else id(key_node))
        return super().construct_mapping(node, deep)


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and `key=value` overrides into one frozen, resolved configuration.

    Raises UserError, in one line, with every problem of the file (or else of the command line).
    """
    if path is None and not DEFAULT_CONFIG.exists():  # installed without the repository
        raise UserError(
            f"command line: no CONFIG; expected a YAML file, as configs/{DEFAULT_CONFIG.name} of "
            "the repository (an empty one has every default)"
        )
    path = Path(path or DEFAULT_CONFIG)
    tree = _read_yaml(path)
    config = _validated(tree, str(path))
    config = _overridden(tree, overrides or [])
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
            for each in replaced:
                section.pop(each, None)
    problems = [problem for text in overrides if (problem := _override(tree, text))]
    if problems:
        raise UserError("command line: " + "; ".join(problems))
    return _validated(tree, "command line")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back equal."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = deepcopy(_parsed(read_text(path)))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected a YAML file such as "
            f"{DEFAULT_CONFIG.name}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); expected a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise UserError(f"{path}{line}: not YAML ({reason})") from error
    if not isinstance(tree, dict | None):
        raise UserError(
            f"{path}: got {type(tree).__name__}, expected sections such as model: and dependence:"
        )
    sections = {name for name, field in Config.model_fields.items() if section_of(field)}
    # A section whose keys are all commented out reads as null and means: the defaults.
    return {
        name: {} if value is None and name in sections else value
        for name, value in (tree or {}).items()
    }


@cache  # a study reads one file for each of its runs
def _parsed(text: str) -> Any:
    return yaml.load(text, Loader=_StrictLoader)


def _override(tree: dict[str, Any], text: str) -> str | None:
    """Set one dotted `key=value` in the file's tree; return what is wrong with it, if anything.

    The tree holds only what was said, so that what was not keeps the default of its stage.
    """
    name, equals, raw = text.partition("=")
    if not equals or name.startswith("-"):
        return f"{text!r} is not key=value, such as dependence.max_texts=100"
    try:
        value = yaml.load(raw, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError):
        value = raw  # a Jinja template is no YAML
    *parents, last = name.split(".")
    known = _names()
    node: Any = tree
    default: Any = _defaults()
    for part in parents:
        default = default.get(part) if isinstance(default, dict) else None
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = deepcopy(default) if isinstance(default, list) else {}
        slot = _slot(node, part)
        inner = None if slot is None else node[slot]
        node = inner if isinstance(inner, dict | list) else None  # a word has no keys
    slot = _slot(node, last) if isinstance(node, list) else last
    if slot is None or node is None or numbered(name).removesuffix(".N") not in known:
        return f"{name}: unknown key; {_nearest(name)}"
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
    if isinstance(node, list) and part.isdecimal() and part.isascii() and int(part) < len(node):
        return int(part)
    return part if isinstance(node, dict) and part in node else None


def _validated(tree: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(
            f"{source}: " + "; ".join(_problem(dict(each)) for each in error.errors())
        ) from None


def _problem(error: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown key; {_nearest(name)}"
    expected = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if error["type"] == "model_type":
        expected = "expected a section of keys"
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return f"{name}: {expected}"  # of keys that do not go together
    return f"{name}: got {error['input']!r}, {expected}"


MOVED = {
    "results.action": "it is a word now: python -m ubmoe.results plan, run, table, figure, record, "
    "readme or prefetch, then CONFIG and keys",
}


def _nearest(name: str) -> str:
    if name in MOVED:
        return MOVED[name]
    known = [dotted for dotted, _ in keys()]
    close = get_close_matches(name, known, 1, 0.75) if "." in name else []
    if not close:
        lasts = {dotted.rpartition(".")[2] for dotted in known}
        found = get_close_matches(name.rpartition(".")[2], sorted(lasts), 1, 0.6)
        close = [dotted for dotted in known if dotted.rpartition(".")[2] in found]
    return f"did you mean {' or '.join(close)}?" if close else "see --help for all keys"
