"""A picture of what the first token's key has to do with DP-after: by length, and by layer."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from ubmoe.report.figures import PALETTE, blank, styled
from ubmoe.report.tables import CAUSAL
from ubmoe.results.entries import KINDS
from ubmoe.results.records import Record, Records


def measured(model: str, records: Records, seeds: Sequence[int]) -> dict[str, list[Record]]:
    """The base, and every row of which a causal twin was measured too, with the sink, by seeds."""
    found: dict[str, list[Record]] = {}
    for entry in KINDS["dependence"](model, records):
        row, _, share = entry.row.rpartition(", ")
        known = share == "after" and "first" in entry.record.section
        again = row == "base" and row in found  # measured in another folder, too
        if known and not again and (entry.seed is None or entry.seed in seeds):
            found.setdefault(row, []).append(entry.record)
    twins = {row for row in found if row + CAUSAL in found}
    wanted = {"base", *twins, *(row + CAUSAL for row in twins)}
    return {row: found[row] for row in sorted(wanted & found.keys(), key=_base_first)}


def _base_first(row: str) -> tuple[bool, str]:
    return row != "base", row


@styled
def figure(model: str, rows: dict[str, list[Record]]) -> Figure:
    """DP-after by length, with the first token's key and without, and that key's share by layer.

    Dashed: tuned under the causal mask. Bars: the standard error over texts, of a mean over seeds.
    """
    found = blank(12.6, 3.7)
    panels = found.subplots(1, 3)
    panels[1].sharey(panels[0])
    names = dict.fromkeys(row.removesuffix(CAUSAL) for row in rows if row != "base")
    colours = {"base": "black"} | dict(zip(names, PALETTE * len(names), strict=False))
    for row, own in rows.items():
        style: Any = {"color": colours[row.removesuffix(CAUSAL)], "lw": 1.3, "label": row}
        style["ls"] = "--" if row.endswith(CAUSAL) else "-"
        sections = [record.section for record in own]
        for axes, path in zip(panels, (("after",), ("without_first", "after")), strict=False):
            buckets = [each for each in zip(*(s["buckets"] for s in sections), strict=True)]
            buckets = [each for each in buckets if each[0]["texts"]]
            heights = [mean(_at(each, path) for each in several) for several in buckets]
            errors = [mean(_at(each["stderr"], path) or 0 for each in s) for s in buckets]
            axes.errorbar(range(len(buckets)), heights, errors, marker=".", elinewidth=0.6, **style)
            ticks = ["{}-{}".format(*several[0]["range"]) for several in buckets]
            axes.set_xticks(range(len(ticks)), ticks)
        layers = zip(*(section["layers"] for section in sections), strict=True)
        panels[2].plot([mean(each["first"] for each in several) for several in layers], **style)
    titles = ("DP-after", "DP-after without the first token's key", "share of the first token")
    labels = ("length of the text, tokens",) * 2 + ("layer",)
    for axes, title, label in zip(panels, titles, labels, strict=True):
        axes.set_title(title, fontsize=9)
        axes.set(xlabel=label, ylabel="percent of attention")
    found.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    found.suptitle(model, fontsize=10)
    return found


def _at(row: dict[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        row = row[name]
    return row
