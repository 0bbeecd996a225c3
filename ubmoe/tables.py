"""Tables of results, as text for a terminal and as Markdown for README.md, from the JSON alone."""

import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ubmoe.published import published

SHARES = ("main", "before", "after")
NO_TEXTS = "no texts"


def dependence_rows(result: dict[str, Any]) -> list[list[str]]:
    """Header, a row a bucket, and all texts: share ± standard error (share if uniform)."""
    section = result["dependence"]
    whole = {**section, **section["overall"]}
    rows = [[f"{low}-{high}", row] for row in section["buckets"] for low, high in [row["range"]]]
    body = [
        [label, str(row["texts"]), *(_cell(row, share) for share in SHARES)]
        for label, row in [*rows, ["all", whole]]
    ]
    return [["tokens", "texts", *SHARES], *body]


def _cell(row: dict[str, Any], share: str) -> str:
    if row[share] is None:
        return NO_TEXTS
    error = row["stderr"][share]
    spread = "" if error is None else f" ±{error:.2f}"
    return f"{row[share]:.2f}{spread} ({row['uniform'][share]:.2f})"


def dependence_caption(result: dict[str, Any]) -> str:
    section, config = result["dependence"], result["config"]
    return (
        f"Attention dependence of {Path(config['model']['name']).name}, "
        f"{config['dependence']['flow']} flow, percent ± standard error over texts (in brackets: "
        f"attention without any preference); {section['tokens']} tokens, {section['truncated']} "
        f"texts cut, {section['outside_buckets']} outside the buckets."
    )


def dependence_text(result: dict[str, Any]) -> str:
    return f"{dependence_caption(result)}\n{aligned(dependence_rows(result))}"


def sts_rows(result: dict[str, Any], name: str) -> list[list[str]]:
    """Header and one row: Spearman x 100 by task, and the average."""
    section = result[name]
    average = "not run" if section["average"] is None else f"{section['average']:.2f}"
    return [
        ["trained", *section["tasks"], "average"],
        [_trained(result), *(f"{score:.2f}" for score in section["tasks"].values()), average],
    ]


def _trained(result: dict[str, Any]) -> str:
    return " then ".join(map(_stage, result["config"]["bi"]["stages"])) or "base"


def _stage(stage: dict[str, Any]) -> str:
    """Its modules; an objective other than simcse, and adapters, are named."""
    words = [stage["objective"]] if stage["objective"] != "simcse" else []
    return " ".join([*words, "+".join(stage["train"]), *(["(LoRA)"] if stage.get("lora") else [])])


def sts_text(result: dict[str, Any]) -> str:
    name = "sts" if "sts" in result else "evaluation"
    model = Path(result["config"]["model"]["name"]).name
    return f"STS of {model}, Spearman x 100.\n{aligned(sts_rows(result, name))}"


def generation_text(result: dict[str, Any]) -> str:
    """Tasks and perplexity by route, then STS by route and mask."""
    section, model = result["generation"], Path(result["config"]["model"]["name"]).name
    names = list(section["metrics"])
    rows = [["route", *names, "average", "perplexity"]]
    for route, each in section["routes"].items():
        scores = [f"{each['tasks'][name][section['metrics'][name]]:.2f}" for name in names]
        average = "not run" if each["average"] is None else f"{each['average']:.2f}"
        rows.append([route, *scores, average, f"{each['perplexity']:.2f}"])
    parts = [f"Generation of the mixture on {model}, percent.\n{aligned(rows)}"]
    if sts := result["sts"]:
        tasks = list(sts[0]["tasks"])
        rows = [["route", "attention", *tasks, "average"]]
        for row in sts:
            cells = [f"{row['tasks'][task]:.2f}" for task in tasks]
            rows.append([row["route"], row["attention"], *cells, f"{row['average']:.2f}"])
        parts.append(f"STS of the same, Spearman x 100.\n{aligned(rows)}")
    return "\n\n".join(parts)


def bitune_text(result: dict[str, Any]) -> str:
    """Tasks, their average, and perplexity of held-out answers."""
    section, model = result["bitune"], Path(result["config"]["model"]["name"]).name
    names = list(section["metrics"])
    scores = [f"{section['tasks'][name][section['metrics'][name]]:.2f}" for name in names]
    average = "not run" if section["average"] is None else f"{section['average']:.2f}"
    rows = [
        ["variant", *names, "average", "perplexity"],
        [section["variant"], *scores, average, f"{section['perplexity']:.2f}"],
    ]
    return f"Bitune on {model}, percent.\n{aligned(rows)}"


def probing_text(result: dict[str, Any]) -> str:
    """The last layer's last probe at the words' own positions: a row a task, a column a model."""
    models = result["probing"]["models"]
    rows = [["task", "split", "metric", *(model["label"] for model in models)]]
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for model in models:
        for row in model["rows"]:
            if _is_shown(row, models):
                metric = "balanced_accuracy" if "balanced_accuracy" in row else "spearman"
                line = found.setdefault((_probed(row), row["split"], metric), {})
                line[model["label"]] = f"{row[metric]:.3f} ±{row[f'{metric}_stderr']:.3f}"
    for key, line in found.items():
        rows.append([*key, *(line.get(model["label"], "not run") for model in models)])
    shown = models[0]["rows"][-1]
    return f"Probes ({shown['probe']}, layer {shown['layer']}).\n{aligned(rows)}"


def _is_shown(row: dict[str, Any], models: list[dict[str, Any]]) -> bool:
    """No control, at the word's own tokens, of the last layer and the last kind of probe."""
    last = models[0]["rows"][-1]
    said = (row["control"], row["position"], row["layer"], row["probe"])
    return said == ("none", "same", last["layer"], last["probe"])


def _probed(row: dict[str, Any]) -> str:
    """The task, and how the two words of a pair were combined."""
    return row["task"] + (f" ({row['features']})" if row["features"] != "word" else "")


TEXT = {
    "dependence": dependence_text,
    "sts": sts_text,
    "generation": generation_text,
    "bitune": bitune_text,
    "probing": probing_text,
    "evaluation": sts_text,
}


def aligned(rows: list[list[str]]) -> str:
    """Columns of a terminal, right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(cell.rjust(width) for cell, width in line) for line in lines)


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table, its first row the header."""
    header, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|" + "---:|" * len(rows[0]), *body])


# --- README.md ---------------------------------------------------------------------------------


def renewed(text: str, records: dict[str, dict[str, Any]]) -> str:
    """The text with every block between `<!-- kind: name -->` and `<!-- end -->` made anew."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]](match[3], records)}\n<!-- end -->"

    return re.sub(r"(<!-- (\w+): ([\w.-]+) -->)\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def _dependence_block(name: str, records: dict[str, dict[str, Any]]) -> str:
    found = [record for key, record in records.items() if key.startswith(f"{name}.dependence.")]
    return "\n\n".join(
        f"{markdown(dependence_rows(record))}\n\n{dependence_caption(record)}" for record in found
    )


def _benchmark_block(name: str, records: dict[str, dict[str, Any]]) -> str:
    parts = []
    for key, record in sorted(records.items()):
        if key.startswith(f"benchmark.{name}."):
            rows = record["rows"]
            cells = [list(rows[0]), *([_number(value) for value in row.values()] for row in rows)]
            parts.append(f"On {record['device']}, torch {record['torch']}:\n\n{markdown(cells)}")
    return "\n\n".join(parts)


def _sts_block(name: str, records: dict[str, dict[str, Any]]) -> str:
    """A row for what was trained on a model, over its seeds: STS by task, DP-after if measured."""
    runs: dict[str, list[str]] = {}
    for key, record in sorted(records.items()):
        if ".sts." in key and _model(record) == name:
            runs.setdefault(_trained(record), []).append(key)
    order = sorted(runs, key=lambda trained: (trained != "base", trained.count(" "), trained))
    rows = [_sts_row(trained, runs[trained], records) for trained in order]
    header = [
        "trained",
        "seeds",
        *records[runs[order[0]][0]]["sts"]["tasks"],
        "average",
        "DP-after",
    ]
    return markdown([header, *rows])


def _sts_row(trained: str, keys: list[str], records: dict[str, dict[str, Any]]) -> list[str]:
    found = [records[key]["sts"] for key in keys]
    tasks = [spread([each["tasks"][task] for each in found]) for task in found[0]["tasks"]]
    if trained == "base":
        name = _model(records[keys[0]])
        measured = [r for key, r in records.items() if ".dependence." in key and _model(r) == name]
    else:  # the encoder of a run is measured under the run's name
        beside = [records.get(key.replace(".sts.", ".dependence.")) for key in keys]
        measured = [record for record in beside if record and _model(record) == "bi"]
    after = [record["dependence"]["overall"]["after"] for record in measured]
    average = spread([each["average"] for each in found])
    return [trained, str(len(keys)), *tasks, average, spread(after)]


# What a forced route is; `uni` and `bi` are the two models themselves, without a mixture.
ROUTES = {
    "uni": "base (uni alone)",
    "bi": "bi alone",
    "mode": "modes (uni causal, bi bidirectional)",
    "half": "half of each",
    "average": "averaged weights",
}


def _mixture_block(name: str, records: dict[str, dict[str, Any]]) -> str:
    """A row for each route and router of a model's mixtures, over the seeds.

    Generation under the causal mask, STS (the average) under both.
    """
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records.values():
        if "generation" in record and _model(record) == name:
            for route, scores in record["generation"]["routes"].items():
                seeds = rows.setdefault(_mixed(record, route), {})
                seeds[record["config"]["seed"]] = {"scores": scores, "sts": _sts_of(record, route)}
            metrics = record["generation"]["metrics"]
    body = [_mixture_row(label, list(rows[label].values()), metrics) for label in _ordered(rows)]
    header = ["generates with", "seeds", *metrics, "perplexity", "STS bidirectional", "STS causal"]
    return markdown([header, *body])


def _mixed(record: dict[str, Any], route: str) -> str:
    """What answers: a forced route, or routers and how they were trained."""
    settings = record["config"]["ubmoe"]
    label = ROUTES.get(route, f"learned, top_k {settings['top_k']}, {settings['objective']}")
    causal = record["generation"]["bi_attention"] == "causal" and route != "uni"
    return label + (", causally tuned expert" if causal else "")


def _ordered(labels: Iterable[str]) -> list[str]:
    """Forced routes in their order, then learned ones; with a causally tuned expert, last."""
    forced = {label: place for place, label in enumerate(ROUTES.values())}
    place = {label: forced.get(label.partition(", causal")[0], len(forced)) for label in labels}
    return sorted(place, key=lambda label: (", causal" in label, place[label], label))


def _sts_of(record: dict[str, Any], route: str) -> dict[str, float]:
    return {row["attention"]: row["average"] for row in record["sts"] if row["route"] == route}


def _mixture_row(label: str, seeds: list[dict[str, Any]], metrics: dict[str, str]) -> list[str]:
    columns = [
        *(
            [each["scores"]["tasks"].get(task, {}).get(metric) for each in seeds]
            for task, metric in metrics.items()
        ),
        [each["scores"]["perplexity"] for each in seeds],
        *([each["sts"].get(mask) for each in seeds] for mask in ("bidirectional", "causal")),
    ]
    cells = [spread([value for value in column if value is not None]) for column in columns]
    return [label, str(len(seeds)), *cells]


def _bitune_block(name: str, records: dict[str, dict[str, Any]]) -> str:
    """A row for each variant on a model, over its seeds, beside the paper's averages."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for record in records.values():
        if "bitune" in record and _model(record) == name:
            trained = record["config"]["bitune"]["max_steps"] != 0
            variant = record["bitune"]["variant"] if trained else "pretrained"
            runs.setdefault(variant, []).append(record["bitune"])
    ablations = published("bitune")["ablations"]
    theirs = {row["method"]: row["scores"] for row in ablations["rows"]}
    metrics = next(iter(runs.values()))[0]["metrics"]
    rows = []
    for variant in theirs:
        if seeds := runs.get(variant, []):
            tasks = [
                spread([each["tasks"][task][metric] for each in seeds])
                for task, metric in metrics.items()
            ]
            perplexity = spread([each["perplexity"] for each in seeds])
            paper = [f"{score:.1f}" for score in theirs[variant]]
            rows.append([variant, str(len(seeds)), perplexity, *tasks, *paper])
    paper = [f"published, {column}" for column in ablations["columns"]]
    return markdown([["variant", "seeds", "perplexity", *metrics, *paper], *rows])


# The published column of a task, and where it stands.
PUBLISHED_PROBES = {
    "telicity": ("accuracy", "telicity"),
    "duration": ("accuracy", "duration"),
    "concreteness": ("concreteness", "spearman"),
    "sensorimotor": ("sensorimotor", "spearman"),
    "word in context (difference)": ("accuracy", "wic difference"),
    "word in context (cosine)": ("accuracy", "wic cosine"),
    "word in context (concatenation)": ("accuracy", "wic concatenation"),
}
PUBLISHED_FAMILY = "Llama-2-7B"


def _probing_block(name: str, records: dict[str, dict[str, Any]]) -> str:
    """Tasks two to five: a row a task and split, a column a model, published numbers in brackets.

    The published ones are of another family, at the same stage of training, and of random splits.
    """
    found = [record for key, record in records.items() if key.startswith(f"{name}.probing.")]
    return "\n\n".join(_probing_table(record["probing"]["models"]) for record in found)


def _probing_table(models: list[dict[str, Any]]) -> str:
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for model in models:
        for row in model["rows"]:
            if _is_shown(row, models) and _probed(row) in PUBLISHED_PROBES:
                metric = "accuracy" if "accuracy" in row else "spearman"
                line = lines.setdefault((_probed(row), row["split"], metric), {})
                line[model["label"]] = _probing_cell(row, metric, model["label"])
    header = ["task", "split", "metric", *(model["label"] for model in models)]
    body = [
        [*key, *(line.get(each, "not run") for each in header[3:])] for key, line in lines.items()
    ]
    last = models[0]["rows"][-1]
    return (
        f"{markdown([header, *body])}\n\nProbes: {last['probe']}, of layer {last['layer']}; "
        f"in brackets: published for {PUBLISHED_FAMILY}."
    )


def _probing_cell(row: dict[str, Any], metric: str, label: str) -> str:
    own = f"{row[metric]:.3f} ±{row[f'{metric}_stderr']:.3f}"
    theirs = _published_probe(_probed(row), row["probe"], label)
    return own if theirs is None or row["split"] != "random" else f"{own} ({theirs:.3f})"


def _published_probe(task: str, probe: str, label: str) -> float | None:
    table, column = PUBLISHED_PROBES[task]
    found = published("feng")[f"{table}_{probe}"]
    for row in found["rows"]:
        if (row["model"], row["method"]) == (PUBLISHED_FAMILY, label):
            return row["scores"][found["columns"].index(column)]
    return None


def _model(record: dict[str, Any]) -> str:
    return Path(record["config"]["model"]["name"]).name if "config" in record else ""


def spread(values: list[float]) -> str:
    """Mean, and with several values their standard deviation (n - 1)."""
    if not values:
        return "not run"
    error = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}"


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


BLOCKS = {
    "dependence": _dependence_block,
    "sts": _sts_block,
    "mixture": _mixture_block,
    "bitune": _bitune_block,
    "probing": _probing_block,
    "benchmark": _benchmark_block,
}
