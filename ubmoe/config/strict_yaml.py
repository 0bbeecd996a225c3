"""YAML without its traps: no key twice, no merges, no tags, no dates, aliases that are bounded."""

import math
import re
from functools import cache
from typing import Any

import yaml

MOST_NODES, DEEPEST = 100_000, 30  # of a text whose aliases are written out
TAG = "tag:yaml.org,2002:"
DIGITS = r"[0-9][0-9_]*"
# YAML 1.1 also reads 010 as 8, 1:30 as 90 and dates, where everybody means 10 or a text.
NUMBERS = {
    "int": r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$",
    "float": rf"[-+]?(?:{DIGITS}\.[0-9_]*|\.{DIGITS})(?:[eE][-+][0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$",
}


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses what it would lose (the first of two equal keys) or multiply."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.sizes: dict[int, tuple[float, int]] = {}  # of a node: all nodes in it, levels
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        self.depth += 1
        too_much = f"more than {MOST_NODES} values or {DEEPEST} levels, aliases written out"
        if self.depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, too_much, mark)
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if not is_alias:
            inner = [] if isinstance(node, yaml.ScalarNode) else node.value
            parts = [part for node in inner for part in (node if type(node) is tuple else (node,))]
            sizes = [(0.0, 0), *(self.sizes[id(part)] for part in parts)]
            depth = 1 + max(levels for _, levels in sizes)
            self.sizes[id(node)] = 1 + sum(size for size, _ in sizes), depth
        size, levels = self.sizes.get(id(node), (math.inf, 0))  # none yet: an alias in itself
        if size > MOST_NODES or levels > DEEPEST:
            raise yaml.composer.ComposerError(None, None, too_much, mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{TAG}merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "<< is not read; write its keys out", key_node.start_mark
                )
            name = self.construct_object(key_node, deep=True)
            if isinstance(name, str) and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name!r} twice", key_node.start_mark
                )
            seen.add(name if isinstance(name, str) else id(key_node))
        return super().construct_mapping(node, deep)

    def construct_undefined(self, node: yaml.Node) -> Any:
        raise yaml.constructor.ConstructorError(
            None, None, f"the tag {node.tag.replace(TAG, '!!')} is not read", node.start_mark
        )


StrictLoader.yaml_implicit_resolvers = {
    first: [
        resolver
        for resolver in known
        if resolver[0].removeprefix(TAG) not in (*NUMBERS, "timestamp")
    ]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for kind, pattern in NUMBERS.items():
    StrictLoader.add_implicit_resolver(TAG + kind, re.compile(pattern), [*"-+.0123456789"])
for kind in ("binary", "timestamp", "omap", "pairs", "set"):
    StrictLoader.yaml_constructors = StrictLoader.yaml_constructors | {
        TAG + kind: StrictLoader.construct_undefined
    }
StrictLoader.yaml_constructors[None] = StrictLoader.construct_undefined


def parsed(text: str) -> Any:
    """The value of a YAML text, nothing in it shared. Raises yaml.YAMLError or ValueError."""
    return _copied(_loaded(text))


@cache  # a study reads one file for each of its runs
def _loaded(text: str) -> Any:
    return yaml.load(text, Loader=StrictLoader)


def _copied(value: Any) -> Any:
    """A copy without shared parts, so that an override changes one place alone."""
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
