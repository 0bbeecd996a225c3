"""Patterns of bidirectional layers, as `bi.layers` writes them."""

from dataclasses import dataclass

from ubmoe.config import FirstToken, Layers, ScanSection
from ubmoe.layered import chosen


@dataclass(frozen=True)
class Pattern:
    """`layers` as bi.layers takes it; `both`: whether each layer is bidirectional.

    first_token: how these layers read it, as `scan.first_token` says.
    """

    layers: Layers
    both: tuple[bool, ...]
    first_token: FirstToken

    @property
    def name(self) -> str:
        """As a reader would say it: all, none, from 3, every 3 from 2."""
        if isinstance(self.layers, dict):
            return " ".join(f"{word} {number}" for word, number in self.layers.items())
        return str(self.layers)


def patterns(settings: ScanSection, depth: int, keep_sink: bool) -> list[Pattern]:
    """none, all, and those of each kind that is asked for, each mask once.

    keep_sink: `bi.keep_sink`, which decides where `scan.first_token` is empty. Raises UserError for
    layers that the model lacks.
    """
    default: FirstToken = "kept" if keep_sink else "full"
    readings = settings.first_token or [default]
    every: dict[tuple[tuple[bool, ...], str], Pattern] = {}
    for reading in readings:
        for layers in [*_named(settings, depth), *settings.layers]:
            numbers = chosen(layers, depth, "scan.layers")
            both = tuple(numbers is None or number in numbers for number in range(depth))
            first = reading if any(both) else readings[0]  # no layer reads it otherwise
            every.setdefault((both, first), Pattern(layers, both, first))
    return list(every.values())


def _named(settings: ScanSection, depth: int) -> list[Layers]:
    last = min(settings.every, depth - 1)
    kinds: dict[str, list[Layers]] = {
        "from": [{"from": number} for number in range(1, depth)],
        "to": [{"to": number} for number in range(depth - 1)],
        "only": [[number] for number in range(depth)],
        "every": [{"every": k, "from": n} for k in range(2, last + 1) for n in range(k)],
    }
    return ["none", "all", *(layers for kind in settings.patterns for layers in kinds[kind])]
