"""The picture at the head of the README: uni, bi, and the three checkpoints that hold both.

python -m studies.compare.diagram image/checkpoints.png
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ubmoe.files import save_figure
from ubmoe.report.figures import blank, styled

UNI, BI, SHARED, TEXT = (
    "#0072b2",
    "#d55e00",
    "#e8e8e8",
    "#222222",
)  # distinguishable with any colour vision
LEFT, MIDDLE, RIGHT = 0.2, 3.9, 7.6


@styled
def checkpoints() -> Figure:
    """Two models that differ in their FFNs; on the right the three checkpoints that hold both."""
    figure = blank(9.4, 5.4)
    axes = figure.subplots()
    axes.set(xlim=(0, 11.6), ylim=(0, 7.0))
    axes.axis("off")
    _model(axes, (LEFT, 4.2), "a language model", "uni FFN", UNI, "causal: it generates")
    _model(axes, (LEFT, 1.0), "its encoder, bi/", "bi FFN", BI, "bidirectional: it embeds")
    _arrow(axes, (1.45, 4.15), (1.45, 2.85))
    axes.text(1.6, 3.5, "train_bi.py", fontsize=8, family="monospace", va="center", color=TEXT)
    for height in (5.1, 1.9):
        _arrow(axes, (LEFT + 2.6, height), (MIDDLE + 0.55, 3.5))
    axes.text(
        *(MIDDLE + 1.35, 3.5), "train_ubmoe.py", fontsize=8, family="monospace", ha="center",
        va="center", color=TEXT,
    )  # fmt: skip
    for height in (5.95, 3.5, 1.05):
        _arrow(axes, (MIDDLE + 2.15, 3.5), (RIGHT - 0.1, height))
    _both(axes, (RIGHT, 5.05), "modes/", "each library reads its own", "without loss")
    _adapter(axes, (RIGHT, 2.6))
    _both(axes, (RIGHT, 0.15), "ubmoe/", "routers weigh both", "the paper's mixture")
    return figure


def _box(axes: Any, place: tuple[float, float], size: tuple[float, float], colour: str) -> None:
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(place, *size, boxstyle=style, facecolor=colour, edgecolor="none"))


def _ffn(
    axes: Any, place: tuple[float, float], width: float, name: str, colour: str, size: float = 9
) -> None:
    _box(axes, place, (width, 0.55), colour)
    axes.text(
        *(place[0] + width / 2, place[1] + 0.27), name, color="white", fontsize=size, ha="center",
        va="center", weight="bold",
    )  # fmt: skip


def _frame(axes: Any, place: tuple[float, float], width: float, title: str, below: str) -> None:
    """A model's box, with what all of its uses share."""
    x, y = place
    _box(axes, (x, y), (width, 1.8), SHARED)
    axes.text(x + width / 2, y + 1.55, title, fontsize=9, ha="center", va="center", color=TEXT)
    axes.text(
        *(x + width / 2, y + 0.55), "attention, norms, embeddings", fontsize=7.5, ha="center",
        va="center", color=TEXT,
    )  # fmt: skip
    axes.text(
        x + width / 2,
        y + 0.2,
        below,
        fontsize=8,
        ha="center",
        va="center",
        color=TEXT,
        style="italic",
    )


def _model(
    axes: Any, place: tuple[float, float], title: str, ffn: str, colour: str, use: str
) -> None:
    _frame(axes, place, 2.5, title, use)
    _ffn(axes, (place[0] + 0.25, place[1] + 0.78), 2.0, ffn, colour)


def _both(axes: Any, place: tuple[float, float], title: str, how: str, what: str) -> None:
    _frame(axes, place, 3.8, f"{title}   {what}", how)
    for number, (name, colour) in enumerate({"uni FFN": UNI, "bi FFN": BI}.items()):
        _ffn(axes, (place[0] + 0.2 + 1.75 * number, place[1] + 0.78), 1.65, name, colour)


def _adapter(axes: Any, place: tuple[float, float]) -> None:
    """The language model, and the encoder as what a few ranks add to its FFN."""
    _frame(axes, place, 3.8, "adapter/   a few percent more", "the adapter is off, or on")
    _ffn(axes, (place[0] + 0.2, place[1] + 0.78), 1.65, "uni FFN", UNI)
    axes.text(place[0] + 2.02, place[1] + 1.05, "+", fontsize=11, ha="center", va="center")
    _ffn(axes, (place[0] + 2.2, place[1] + 0.78), 1.4, "bi - uni, LoRA", BI, size=7.5)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    style: Any = {"arrowstyle": "-|>", "mutation_scale": 11, "color": "#555555", "lw": 1.1}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))


if __name__ == "__main__":
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("picture", type=Path, help="where it is written, as a .png")
    save_figure(checkpoints(), parser.parse_args().picture)
