"""The figure of an encoder's cost: similarity across, lost language modelling up.

Of runs that were scored on their way (`trajectory.steps`), each a line that begins untrained.
"""

from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

from studies.compare.published import published
from studies.compare.records import Records
from studies.compare.rows import perplexity_ratio, reads_causally
from ubmoe.report.figures import PALETTE, blank, plain_ticks, styled
from ubmoe.results.records import Record

MASKS = {  # in words, by what the section `bi` says: causal or not, some layers, sink kept
    (True, False, False): "causal",
    (False, False, False): "bidirectional",
    (False, True, False): "bidirectional in later layers",
    (False, False, True): "bidirectional, sink kept",
    (False, True, True): "bidirectional in later layers, sink kept",
}
ALONE = 1000  # of a language-model loss's weight: nothing of the contrastive loss is left
PAPER = ("Qwen1.5-0.5B-Chat", "ffn")  # its row of Table 2; of its perplexity nothing is published


def of_model(model: str, records: Records) -> list[Record]:
    """The runs of a model that were scored on their way, with perplexity."""
    return [
        record
        for record in records.of("sts", model)
        if any(point["perplexity"] for point in record.section.get("trajectory", ()))
    ]


def mask(record: Record) -> str:
    """How an encoder reads, in words."""
    settings = record.config["bi"]
    layers, is_causal = settings.get("layers", "all"), reads_causally(settings)
    some, kept = layers not in ("all", "none"), bool(settings.get("keep_sink"))
    return MASKS[is_causal, some and not is_causal, kept and not is_causal]


def kind(record: Record) -> str:
    """What a line is of: the mask, and what else differs from FFNs tuned contrastively with EOL."""
    if is_noise(record):
        return "noise"
    settings = record.config["bi"]
    stage = settings["stages"][0]
    weight = stage.get("lm_weight", 0)
    words = {
        ", ".join(stage["train"]): stage["train"] != ["ffn"],
        "plain mean": settings.get("form") == "plain",
        "LM loss alone": weight >= ALONE,
        "with LM loss": 0 < weight < ALONE,
    }
    return ", ".join([mask(record), *(word for word, holds in words.items() if holds)])


def is_noise(record: Record) -> bool:
    """Of `studies.compare.noise`: points at distances from the weights, and no step."""
    points = record.section["trajectory"]
    return len(points) > 1 and not any(point["step"] for point in points)


def style(record: Record, colours: dict[str, str]) -> dict[str, Any]:
    """A colour for each mask; dashed: other modules; squares: the plain mean; grey: controls."""
    name = kind(record)
    is_control = "LM loss" in name or name == "noise"
    modules = record.config["bi"]["stages"][0]["train"]
    return {
        "color": "grey" if is_control else colours[mask(record)],
        "ls": "-" if modules == ["ffn"] and name != "noise" else "--",
        "marker": "s" if "plain mean" in name else "^" if is_control else "o",
        "mfc": "white" if "LM loss alone" in name or name == "noise" else None,
    }


def ratios(record: Record) -> list[tuple[float, float]]:
    """(STS, perplexity over the untrained model's) of each point, the untrained one first.

    The ratio is the geometric mean over the texts.
    """
    points = record.section["trajectory"]
    return [
        (
            point["sts"]["average"],
            geometric_mean(perplexity_ratio(points, place, text) for text in point["perplexity"]),
        )
        for place, point in enumerate(points)
    ]


def paper(tasks: str) -> tuple[float, str]:
    """The paper's score to hold beside `tasks`, and what it is: of STSB alone, or of all ten."""
    table = published("ubmoe")["sts"]
    column = "STSBenchmark" if tasks.startswith("STSB") and "," not in tasks else "average"
    [row] = [row for row in table["rows"] if (row["model"], row["method"]) == PAPER]
    score = row["scores"][table["columns"].index(column)]
    return score, f"the paper's {PAPER[0]}, {column}; perplexity not published"


@styled
def figure(model: str, scored: Sequence[Record]) -> Any:
    """A line a run, from the black, untrained point on. See `style`."""
    drawn = blank(7.2, 4.4)
    axes: Any = drawn.subplots()
    masks = [name for name in MASKS.values() if name in {mask(record) for record in scored}]
    colours = dict(zip(masks, PALETTE, strict=False))
    for record in sorted(scored, key=lambda record: (masks.index(mask(record)), kind(record))):
        name = kind(record)
        new = name not in axes.get_legend_handles_labels()[1]
        axes.plot(
            *zip(*ratios(record), strict=True),
            **style(record, colours) | {"lw": 1.3, "ms": 4, "label": name if new else None},
        )
    starts = sorted({ratios(record)[0] for record in scored})
    axes.plot(*zip(*starts, strict=True), ls="", marker="o", ms=5, color="black", label="untrained")
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    texts = " and ".join(scored[0].section["trajectory"][0]["perplexity"])
    tasks = ", ".join(scored[0].section["trajectory"][0]["sts"]["tasks"])
    axes.set(
        xlabel=f"similarity: {tasks}, Spearman x 100",
        ylabel=f"perplexity over the untrained model's\n({texts})",
    )
    score, label = paper(tasks)
    axes.plot(
        *(score, 0), ls="", marker="o", ms=9, mfc="none", mec="grey", clip_on=False,
        transform=axes.get_xaxis_transform(), label=label,
    )  # fmt: skip
    axes.legend(loc="upper left")
    axes.set_title(model, fontsize=10)
    return drawn
