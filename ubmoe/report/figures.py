"""Figures of results.

Drawn from what is recorded, without torch. Every picture has the style of `STYLE`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from itertools import product
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from ubmoe.config import FORMS

STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 160,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.dpi": "figure",
}
Arguments = ParamSpec("Arguments")
Drawn = TypeVar("Drawn")


def styled(draw: Callable[Arguments, Drawn]) -> Callable[Arguments, Drawn]:
    """Draw in our style, and leave matplotlib's as it was."""

    @wraps(draw)
    def drawn(*values: Arguments.args, **keys: Arguments.kwargs) -> Drawn:
        with matplotlib.rc_context(STYLE):
            return draw(*values, **keys)

    return drawn


# Distinguishable with any colour vision (Okabe and Ito, 2008).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SHARES = {"before": "#4c78a8", "main": "#e6a532", "after": "#c8553d"}  # as in a text's order
ON_COLOUR: Any = {"ha": "center", "va": "center", "color": "white", "fontsize": 9}


@styled
def dependence(section: dict[str, Any]) -> dict[str, Figure]:
    """DP by length bucket, DP-after by layer and head, and norms where they were measured."""
    figures = {"dependence_buckets.png": _buckets(section), "dependence_heads.png": _heads(section)}
    if section.get("norms"):  # older results have none
        figures["dependence_norms.png"] = _norms(section["norms"])
    return figures


@styled
def routing(log: list[dict[str, Any]], roles: list[dict[str, Any]]) -> dict[str, Figure]:
    """Router training over its steps, and the weight of bi by layer and by role of the token."""
    rows = [row for row in log if "loss" in row]
    figure = blank(14.5 if rows else 4.6, 3.4)
    panels = figure.subplots(1, 4 if rows else 1, squeeze=False)[0]
    if rows:
        _curve(panels[0], rows, "loss")
        _curve(panels[1], rows, "weight of bi and entropy")
        _layers(panels[2], rows)
    _roles(panels[-1], roles)
    return {"routing.png": figure}


def _layers(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Mean weight of bi over the steps, a line a layer, the deeper the lighter."""
    steps = [row["step"] for row in rows]
    lines = list(zip(*(row["bi_weight_by_layer"] for row in rows), strict=True))
    for layer, line in enumerate(lines):
        colour = matplotlib.colormaps["viridis"](layer / max(1, len(lines) - 1))
        label = f"layer {layer}" if layer in (0, len(lines) - 1) else None
        axes.plot(steps, line, lw=1.2, color=colour, label=label)
    axes.set(xlabel="step", ylabel="weight of bi by layer")
    axes.legend()


def _roles(axes: Any, roles: list[dict[str, Any]]) -> None:
    """Weight of bi over the layers, a line a role."""
    for role in roles[0]:
        values = [np.nan if layer[role] is None else layer[role] for layer in roles]
        axes.plot(range(len(roles)), values, marker=".", lw=1.4, label=role)
    axes.axhline(0.5, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="layer", ylabel="weight of bi after training", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


CURVES = {  # of a stage's log: what stands in one panel, under the names of the log
    "loss": ("loss",),
    "cosine": ("positive_cosine", "negative_cosine"),
    "alignment and uniformity": ("alignment", "uniformity"),
    "accuracy": ("masked_accuracy",),
    "weight of bi and entropy": ("bi_weight", "router_entropy"),
}


@styled
def mixing(section: dict[str, Any]) -> dict[str, Figure]:
    """Bitune's learned alpha by layer, and the loss over the steps; {} where there is neither."""
    rows = [row for row in section["log"] if "loss" in row]
    mixed = "alpha_keys" in section
    if not rows:
        return {}
    figure = blank(8.2 if mixed else 4.1, 3.2)
    panels = figure.subplots(1, 1 + mixed, squeeze=False)[0]
    _curve(panels[0], rows, "loss")
    if mixed:
        for what in ("keys", "values"):
            values = section[f"alpha_{what}"]
            panels[1].plot(range(len(values)), values, marker="o", lw=1.4, label=what)
        panels[1].axhline(0.5, color="grey", lw=0.8, ls=":")
        panels[1].set(xlabel="layer", ylabel="alpha, share of the second reading", ylim=(0, 1))
        panels[1].xaxis.get_major_locator().set_params(integer=True)
        panels[1].legend()
    return {"bitune.png": figure}


@styled
def probing(section: dict[str, Any]) -> dict[str, Figure]:
    """Probing accuracy by position, and anisotropy by layer, a line a model; the first in black."""
    figures = {"probing_anisotropy.png": anisotropy(section["models"])}
    if any("@" in row["task"] for model in section["models"] for row in model["rows"]):
        figures["probing_context.png"] = context(section["models"])
    return figures


@styled
def context(models: list[dict[str, Any]], title: str = "") -> Figure:
    """Balanced accuracy at each of the five words, a panel a feature; dashed: the token before.

    Of the first layer and the last kind of probe, with no word on both sides of the split.
    """
    every = [list(_context_rows(model, models[0]["rows"])) for model in models]
    names = list(dict.fromkeys(row["feature"] for rows in every for row in rows))
    position, probe = models[0]["rows"][0]["position"], models[0]["rows"][-1]["probe"]
    columns = min(2, len(names))  # for the width of a page
    lines = -(-len(names) // columns)
    figure = blank(3.6 * columns, 0.9 + 2.5 * lines)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes in panels[len(names) :]:
        axes.remove()
    for axes, name in zip(panels, names, strict=False):
        for number, (model, rows) in enumerate(zip(models, every, strict=True)):
            for way, style in (("same", "-"), ("previous", "--")):
                line = [row for row in rows if (row["feature"], row["position"]) == (name, way)]
                axes.errorbar(
                    [row["word"] for row in line],
                    [row["balanced_accuracy"] for row in line],
                    [row["balanced_accuracy_stderr"] for row in line],
                    fmt=style,
                    elinewidth=0.6,
                    **_model_style(number),
                    label=model["label"] if way == position else None,
                )
        axes.axhline(0.5, color="grey", lw=0.8, ls=":")
        axes.set(xlabel="word", xticks=range(1, 6), ylim=(0.3, 1.03))
        axes.set_title(name.replace("_", " "), fontsize=10)
    figure.supylabel(f"balanced accuracy ({probe} probe)", fontsize=10)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _model_style(number: int) -> dict[str, Any]:
    """A line's look: the first, the untrained one where there is one, is black.

    Where a colour is used again, the marker differs.
    """
    wrapped, color = divmod(number - 1, len(PALETTE))
    marker = " os^D"[wrapped % 5] if number else " "
    return {"color": PALETTE[color] if number else "black", "marker": marker, "ms": 3, "lw": 1.3}


def _context_rows(model: dict[str, Any], shown: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Its rows of the first layer, the last kind of probe and a split without shared words."""
    kept = ("none", shown[0]["layer"], shown[-1]["probe"])
    for row in model["rows"]:
        feature, at, word = row["task"].partition("@")
        settings = (row["control"], row["layer"], row["probe"])
        if at and row["split"] != "random" and settings == kept:
            yield {**row, "feature": feature, "word": int(word)}


def anisotropy(models: list[dict[str, Any]]) -> Figure:
    figure = blank(7.6, 3.2)
    titles = {"between": "words of different sentences", "within": "words of one sentence"}
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for number, model in enumerate(models):
            values, look = model["anisotropy"][kind], _model_style(number)
            axes.plot(range(len(values)), values, label=model["label"], **look)
        axes.set(title=title, xlabel="layer (0: embeddings)", ylabel="mean cosine")
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


@styled
def training(stages: list[dict[str, Any]]) -> dict[str, Figure]:
    """A row of panels for each stage: what it logged, over its steps; none where none trained."""
    logs = [[row for row in stage["log"] if "loss" in row] for stage in stages]
    if not any(logs):
        return {}
    shown = [
        [c for c, keys in CURVES.items() if any(keys[0] in row for row in log)] for log in logs
    ]
    columns = max(map(len, shown))
    figure = blank(0.6 + 3.4 * columns, 0.5 + 2.5 * len(stages))
    grid = figure.subplots(len(stages), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for number, (stage, log, curves) in enumerate(zip(stages, logs, shown, strict=True)):
        for axes, curve in zip(grid[number], curves, strict=False):
            _curve(axes, log, curve)
        grid[number, 0].set_title(f"stage {number}: {stage['objective']}", loc="left", fontsize=9)
    return {"training.png": figure}


@styled
def trajectory(points: list[dict[str, Any]]) -> dict[str, Figure]:
    """Similarity against the perplexity over the untrained model's, a panel a text, a line a stage.

    Each point is named by its step. {} where no perplexity was asked for.
    """
    names = list(points[0]["perplexity"]) if points else []
    if not names:
        return {}
    figure = blank(0.4 + 3.6 * len(names), 3.4)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        base = points[0]["perplexity"][name]["perplexity"]
        for stage in sorted({point["stage"] for point in points}):
            of_stage = [point for point in points if point["stage"] == stage]
            across = [point["perplexity"][name]["perplexity"] / base for point in of_stage]
            up = [point["sts"]["average"] for point in of_stage]
            axes.plot(across, up, lw=1.2, marker="o", ms=4, label=f"stage {stage}")
            for point, x, y in zip(of_stage, across, up, strict=True):
                axes.annotate(f" {point['step']}", (x, y), fontsize=7)
        axes.set(xlabel=f"perplexity on {name}, over the start's", ylabel="Spearman x 100")
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
    return {"trajectory.png": figure}


def _curve(axes: Any, log: list[dict[str, float]], curve: str) -> None:
    axes.set_visible(True)
    for key in CURVES[curve]:
        steps = [row["step"] for row in log]
        label = key.replace("_", " ").removesuffix(" cosine")
        axes.plot(steps, [row[key] for row in log], lw=1.4, marker=".", ms=4, label=label)
    axes.set(xlabel="step", ylabel=curve)
    losses = [row["loss"] for row in log]
    if curve == "loss" and max(losses) > 10 * min(losses) > 0:
        axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(CURVES[curve]) > 1:
        axes.legend()


def plain_ticks(axis: Any) -> None:
    """Ticks of a narrow logarithmic axis, as plain numbers."""
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def blank(width: float, height: float) -> Figure:
    """An empty figure of inches."""
    return Figure(figsize=(width, height), layout="constrained")


def _buckets(section: dict[str, Any]) -> Figure:
    """Stacked shares of every bucket that holds texts; a line marks where uniform after begins.

    Hatched: what of DP-before goes to the text's first token. Dashed: where after would begin
    without that key.
    """
    filled = [bucket for bucket in section["buckets"] if bucket["texts"]]
    figure = blank(1.6 + 1.3 * len(filled), 3.8)
    axes = figure.subplots()
    places = np.arange(len(filled))
    floor = np.zeros(len(filled))
    for share, colour in SHARES.items():
        heights = np.array([bucket[share] for bucket in filled])
        axes.bar(places, heights, 0.62, floor, color=colour, label=f"DP-{share}")
        for place, low, height in zip(places.tolist(), floor, heights, strict=True):
            if height > 4:
                axes.text(place, low + height / 2, f"{height:.1f}", **ON_COLOUR)
        floor += heights
    if all("first" in bucket for bucket in filled):
        first = [bucket["first"] for bucket in filled]
        style: Any = {"facecolor": "none", "edgecolor": "white", "linewidth": 0}
        axes.bar(places, first, 0.62, hatch="////", **style)
        without = [100 - bucket["without_first"]["after"] for bucket in filled]
        dashed: Any = {"color": SHARES["after"], "linestyles": "--", "label": "after without it"}
        axes.hlines(without, places - 0.38, places + 0.38, **dashed)
    uniform = [100 - bucket["uniform"]["after"] for bucket in filled]
    axes.hlines(
        uniform, places - 0.38, places + 0.38, color="black", lw=1.5, label="uniform attention"
    )
    labels = [
        f"{bucket['range'][0]}-{bucket['range'][1]}\n{bucket['texts']} texts" for bucket in filled
    ]
    axes.set(
        ylim=(0, 100), ylabel="share of attention, percent", xlabel="length of the text, tokens"
    )
    axes.set_xticks(places, labels)
    handles, names = axes.get_legend_handles_labels()
    if all("first" in bucket for bucket in filled):  # its white needs a ground
        ground: Any = {"facecolor": SHARES["before"], "edgecolor": "white", "linewidth": 0}
        handles, names = [*handles, Patch(hatch="////", **ground)], [*names, "to the first token"]
    figure.legend(handles, names, loc="outside upper center", ncols=2)
    return figure


def _heads(section: dict[str, Any]) -> Figure:
    """DP-after of every layer (down) and head (across)."""
    after = np.array([[head["after"] for head in layer["heads"]] for layer in section["layers"]])
    figure = blank(2.2 + 0.28 * after.shape[1], 1.6 + 0.28 * after.shape[0])
    axes = figure.subplots()
    image = axes.imshow(after, cmap="magma", vmin=0, aspect="auto")
    axes.set(xlabel="head", ylabel="layer", title="DP-after, percent")
    for axis, count in ((axes.xaxis, after.shape[1]), (axes.yaxis, after.shape[0])):
        axis.set_ticks(range(0, count, max(1, count // 12)))
    figure.colorbar(image)
    return figure


def _norms(masks: dict[str, Any]) -> Figure:
    """The first token's states by layer, a line a mask, and thin the other tokens'."""
    figure = blank(6.4, 3.6)
    axes: Any = figure.subplots()
    for colour, (mask, norms) in zip(PALETTE, masks.items(), strict=False):
        # where the sink is kept, the first token's line is the causal one
        style = "--" if mask == "sink kept" else "-"
        axes.plot(norms["first"], color=colour, lw=2, ls=style, label=f"first token, {mask}")
        if None not in norms["others"]:
            axes.plot(norms["others"], color=colour, lw=0.8, ls=style, label=f"others, {mask}")
    axes.set(yscale="log", xlabel="layer (0: embeddings)", ylabel="mean norm of the state")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right center")
    return figure


# The patterns of a scan that are drawn, their colours, and the names of their axis.
SCANNED = {"from": "#0072b2", "to": "#d55e00", "only": "#009e73"}
WORDS = {"from": "from layer N on", "to": "up to layer N", "only": "layer N alone"}


@styled
def scan(section: dict[str, Any]) -> dict[str, Figure]:
    """STS by the first or last bidirectional layer; bars: every K-th layer.

    A row of panels for each form, and each reading of the first token, in the form's own pooling.
    """
    readings: dict[tuple[str | None, str | None], list[dict[str, Any]]] = {}
    for row in section["patterns"]:
        readings.setdefault((row.get("form"), row.get("first_token")), []).append(row)
    bars = any(_every(rows) for rows in readings.values())
    figure = blank(8.6 if bars else 5.6, 3.6 * len(readings))
    panels = figure.subplots(len(readings), 2 if bars else 1, sharey="row", squeeze=False)
    for ((form, first), rows), axes in zip(readings.items(), panels, strict=True):
        pooling = FORMS[form][1] if form else "mean"  # type: ignore[index]
        _scan_panels(axes, rows, pooling)
        said = f"Spearman x 100, {section['pairs']} pairs of {section['task']}"
        axes[0].set(xlabel="N", ylabel=said)
        named = [f"{form}, {pooling.replace('_', ' ')}"] if form else []
        named += [f"first token {first}"] if first else []
        axes[0].set_title("; ".join(named))
    return {"scan.png": figure}


def _every(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a scan's rows that are of every K-th layer."""
    return [row for row in rows if isinstance(row["layers"], dict) and "every" in row["layers"]]


def _scan_panels(axes: Any, rows: Sequence[dict[str, Any]], pooling: str) -> None:
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    for kind, colour in SCANNED.items():
        line = [
            (at, row[pooling])
            for row in rows
            if (at := _axis_position(row["layers"], kind)) is not None
        ]
        if line:
            places, scores = zip(*line, strict=True)
            style: Any = {"marker": ".", "color": colour, "lw": 1.3, "elinewidth": 0.5}
            heights = [score["score"] for score in scores]
            axes[0].errorbar(places, heights, _error_bars(scores), label=WORDS[kind], **style)
    if every := _every(rows):
        names = [row["name"].replace("every ", "").replace(" from ", "\nfrom ") for row in every]
        heights = [row[pooling]["score"] for row in every]
        reach = _error_bars([row[pooling] for row in every])
        axes[1].bar(names, heights, 0.7, yerr=reach, color="#999999", error_kw={"lw": 0.7})
        axes[1].set(xlabel="every K-th layer")
        axes[1].tick_params(axis="x", labelsize=7)
    for name, style in (("none", "-"), ("all", ":")):
        levels = [row[pooling]["score"] for row in rows if row["name"] == name]  # or none of it
        for score, panel in product(levels, axes):
            panel.axhline(score, color="black", lw=0.9, ls=style, label=f"{name} ({score:.1f})")
    axes[0].legend()


def _axis_position(layers: Any, kind: str) -> int | None:
    """Where on the axis of N a pattern stands; None: it is of another kind."""
    if kind == "only":
        return layers[0] if isinstance(layers, list) else None
    return layers[kind] if isinstance(layers, dict) and list(layers) == [kind] else None


def _error_bars(scores: Sequence[dict[str, Any]]) -> np.ndarray:
    """(2, patterns) how far the interval of the gain goes below and above it."""
    return np.array(
        [
            [score["gain"] - score["interval"][0] for score in scores],
            [score["interval"][1] - score["gain"] for score in scores],
        ]
    ).clip(0)


@styled
def swap(section: dict[str, Any]) -> dict[str, Figure]:
    """The cost of each encoder layer in the model, and the saving of each model layer in it."""
    figure = blank(7.0, 3.4)
    axes: Any = figure.subplots()
    swap_bars(axes, section["layers"])
    axes.set(xlabel="layer that is swapped", ylabel="change of the loss, nats a token")
    axes.legend()
    return {"swap.png": figure}


SWAPPED = {
    "in": ("the encoder's, put into the model", PALETTE[1]),
    "back": ("the model's, put into the encoder", PALETTE[0]),
}


def swap_bars(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Two bars a layer with their intervals. rows: {word of SWAPPED: change and interval}."""
    places = np.arange(len(rows))
    for (word, (label, colour)), shift in zip(SWAPPED.items(), (-0.2, 0.2), strict=True):
        changes = [row[word] for row in rows]
        heights = np.array([change["change"] for change in changes])
        ends = np.array([change["interval"] for change in changes])
        reach = np.stack([heights - ends[:, 0], ends[:, 1] - heights]).clip(0)
        axes.bar(
            places + shift, heights, 0.4, yerr=reach, color=colour, label=label,
            error_kw={"lw": 0.6},
        )  # fmt: skip
    axes.axhline(0, color="black", lw=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)


@styled
def shift(rows: dict[str, dict[str, Any]]) -> Figure:
    """The cost of tuning, and the cost and saving of exchanging the first token's share alone.

    rows: `shift` sections by label. Bars: 95 % intervals over chats. Hollow: a control. What an
    earlier version did not measure is left out.
    """
    figure = blank(10.4, 1.9 + 0.6 * len(rows))
    panels = figure.subplots(1, 2, sharey=True)
    shown = [name for name in SHIFTED if all(name in row["changes"] for row in rows.values())]
    lifts = np.linspace(-0.28, 0.28, len(shown))
    for axes, by_answer in zip(panels, (False, True), strict=True):
        for name, lift in zip(shown, lifts, strict=True):
            label, colour, sign, marker = SHIFTED[name]
            changes = [section["changes"][name] for section in rows.values()]
            changes = [change["by_answer"] for change in changes] if by_answer else changes
            values = np.array([sign * change["change"] for change in changes])
            ends = np.sort([np.multiply(sign, change["interval"]) for change in changes])
            reach = np.stack([values - ends[:, 0], ends[:, 1] - values]).clip(0)
            axes.errorbar(
                values, np.arange(len(rows)) + lift, xerr=reach, label=label, color=colour,
                marker=marker, ms=4, ls="", elinewidth=1,
                mfc=None if name in ("whole", "in", "back") else "white",
            )  # fmt: skip
        axes.axvline(0, color="grey", lw=0.6)
        said = "each answer once" if by_answer else "per token"
        axes.set(xlabel=f"change of the loss, nats a token, {said}")
    panels[0].set_yticks(range(len(rows)), list(rows), fontsize=8)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


SHIFTED = {  # label, colour, sign, and marker
    "whole": ("lost by the encoder", "black", 1, "o"),
    "in": ("lost by the model with the encoder's shares", PALETTE[1], 1, "o"),
    "in elsewhere": ("the same, on other heads", PALETTE[1], 1, "o"),
    "in scaled": ("its heads' outputs scaled as much", PALETTE[1], 1, "D"),
    "back": ("saved in the encoder by the model's shares", PALETTE[0], -1, "o"),
    "back elsewhere": ("the same, on other heads", PALETTE[0], -1, "o"),
    "back scaled": ("its heads' outputs scaled as much", PALETTE[0], -1, "D"),
    "temperature": ("saved in the encoder by one temperature", PALETTE[2], -1, "s"),
}


@styled
def attention_map(attention: np.ndarray, tokens: Sequence[str]) -> dict[str, Figure]:
    """(T, T) mean unmasked attention of a short text, its parts marked as in Figure 3."""
    figure = blank(5.6, 5.2)
    axes = figure.subplots()
    image = axes.imshow(attention, cmap="viridis", vmin=0, vmax=np.quantile(attention, 0.98))
    words = [token.strip() or repr(token)[1:-1] for token in tokens]
    axes.set_xticks(range(len(tokens)), words, rotation=90, fontsize=7)
    axes.set_yticks(range(len(tokens)), words, fontsize=7)
    axes.set(xlabel="attended token", ylabel="token")
    edge = np.arange(len(tokens) + 1) - 0.5
    for way in ("pre", "post"):  # both sides of the diagonal
        axes.step(edge, edge, where=way, color="white", lw=1.2)
    _label_parts(axes, attention)
    figure.colorbar(image, label="mean attention over layers and heads, unmasked", shrink=0.85)
    return {"dependence_map.png": figure}


def _label_parts(axes: Any, attention: np.ndarray) -> None:
    """Label the three parts of the map with their names and sums."""
    count = len(attention)
    shares = {
        "before": np.tril(attention, -1).sum() / count * 100,
        "main": attention.trace() / count * 100,
        "after": np.triu(attention, 1).sum() / count * 100,
    }
    inside: Any = {"xycoords": "axes fraction", "textcoords": "axes fraction"}
    places = {"before": (0.24, 0.2), "main": (0.42, 0.88), "after": (0.76, 0.68)}
    for share, place in places.items():
        box = {"boxstyle": "round", "facecolor": SHARES[share], "edgecolor": "white"}
        text = f"DP-{share}\n{shares[share]:.1f} %"
        axes.annotate(text, place, xytext=place, bbox=box, **inside, **ON_COLOUR)
    arrow = {"arrowstyle": "->", "color": "white", "shrinkA": 14}
    axes.annotate("", (0.28, 0.72), xytext=places["main"], arrowprops=arrow, **inside)
