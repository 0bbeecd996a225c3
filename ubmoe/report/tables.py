"""Tables of results as text for a terminal, and the names of their rows and cells."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ubmoe.dependence import SHARES
from ubmoe.similarity import sections

NO_TEXTS = "no texts"
CAUSAL = " causal"  # after a row's modules: tuned under the causal mask, a control
COLLAPSED_BELOW = 0.02  # in cosine; of runs that learn it is 0.4 at least


def dependence_rows(result: dict[str, Any]) -> list[list[str]]:
    """Header, a row a bucket, and all texts: share ± standard error (share if uniform).

    Where it was measured, the share of the first token, and DP-after without that key.
    """
    section = result["dependence"]
    whole = {**section, **section["overall"]}
    rows = [[f"{low}-{high}", row] for row in section["buckets"] for low, high in [row["range"]]]
    columns: dict[str, tuple[str, ...]] = {share: (share,) for share in SHARES}
    if "first" in section:
        columns |= {"first": ("first",), "after without first": ("without_first", "after")}
    body = [
        [label, str(row["texts"]), *(_cell(row, path) for path in columns.values())]
        for label, row in [*rows, ["all", whole]]
    ]
    return [["tokens", "texts", *columns], *body]


def _cell(row: dict[str, Any], path: tuple[str, ...]) -> str:
    value, error, even = (
        reduce(getitem, path, place) for place in (row, row["stderr"], row["uniform"])
    )
    if value is None:
        return NO_TEXTS
    spread = "" if error is None else f" ±{error:.2f}"
    return f"{value:.2f}{spread} ({even:.2f})"


def dependence_caption(result: dict[str, Any]) -> str:
    section, config = result["dependence"], result["config"]
    return (
        f"Attention dependence of {Path(config['model']['name']).name}, "
        f"{config['dependence']['flow']} flow, percent ± standard error over texts (in brackets: "
        f"attention without any preference); {section['tokens']} tokens, {section['truncated']} "
        f"texts cut, {section['outside_buckets']} outside the buckets."
    )


def dependence_text(result: dict[str, Any]) -> str:
    parts = [dependence_caption(result), aligned(dependence_rows(result))]
    if norms := result["dependence"].get("norms"):  # older results have none
        said = "Mean norm of the states, in the layer with the largest, of first tokens (others)"
        parts.append(f"{said}: {norms_line(norms)}.")
    return "\n".join(parts)


def norms_line(norms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> str:
    """By mask, over the layers: the first token's (the others')."""
    most = {
        mask: [
            max((norm for norm in of_mask[who] if norm is not None), default=math.nan)
            for who in ("first", "others")
        ]
        for mask, of_mask in norms.items()
    }
    return ", ".join(f"{mask} {first:.0f} ({rest:.0f})" for mask, (first, rest) in most.items())


def sts_rows(section: dict[str, Any], what: str, label: str) -> list[list[str]]:
    """Header, Spearman x 100 by task, and the average; below, the 95 % interval of each."""
    average = "not run" if section["average"] is None else f"{section['average']:.2f}"
    rows = [
        [what, *section["tasks"], "average"],
        [label, *(f"{score:.2f}" for score in section["tasks"].values()), average],
    ]
    if intervals := section.get("intervals"):  # older results have none
        ends = (intervals[name] for name in section["tasks"])
        rows.append(["95 %", *("{:.1f} to {:.1f}".format(*end) for end in ends), ""])
    return rows


def trained(result: dict[str, Any]) -> str:
    """The row of a run of train_bi.py: its modules, or a study's name. A collapsed run is apart."""
    name = str(result["config"].get("results", {}).get("row") or family(result))
    stages = result.get("sts", {}).get("stages", [])
    return name + (", collapsed" if has_collapsed(stages) else "")


def has_collapsed(stages: Sequence[dict[str, Any]]) -> bool:
    """Whether a contrastive stage ended with all texts alike: positives no nearer than others."""
    for stage in stages:
        logged = [row for row in stage.get("log", []) if "negative_cosine" in row]
        if (
            logged
            and logged[-1]["positive_cosine"] - logged[-1]["negative_cosine"] < COLLAPSED_BELOW
        ):
            return True
    return False


def family(result: dict[str, Any]) -> str:
    """The modules that train_bi.py trained, as in Table 2; `causal` where under that mask."""
    settings = result["config"]["bi"]
    words = " then ".join(map(_stage_name, settings["stages"])) or "base"
    layers = settings.get("layers", "all")
    if settings.get("attention") == "causal" or layers == "none":
        return words + CAUSAL
    if isinstance(layers, dict):
        words += f", layers {' '.join(f'{word} {n}' for word, n in layers.items())}"
    elif layers != "all":
        words += f", layers {', '.join(map(str, layers))}"
    return words + (", sink kept" if settings.get("keep_sink") else "")


def _stage_name(stage: dict[str, Any]) -> str:
    """Its modules; an objective other than simcse, and adapters, are named."""
    words = [stage["objective"]] if stage["objective"] != "simcse" else []
    more = ["(LoRA)"] if stage.get("lora") else []
    more += ["with LM loss"] if stage.get("lm_weight") else []
    return " ".join([*words, "+".join(stage["train"]), *more])


def sts_text(result: dict[str, Any]) -> str:
    [section] = sections(result)
    rows = sts_rows(section, "trained", trained(result))
    return f"STS of {model_of(result)}, Spearman x 100.\n{aligned(rows)}"


def mteb_rows(section: dict[str, Any]) -> list[list[str]]:
    """Header, a row for each task of mteb, for each type's mean, and for both means."""
    rows = [
        [name, *(str(row[key]) for key in ("type", "metric")), f"{row['score']:.2f}"]
        for name, row in section["tasks"].items()
    ]
    rows += [["mean", kind, "", f"{score:.2f}"] for kind, score in section["types"].items()]
    rows += [["mean of tasks", "", "", f"{section['average']:.2f}"]]
    rows += [["mean of types", "", "", f"{section['average_of_types']:.2f}"]]
    return [["task", "type", "metric", "score"], *rows]


def evaluation_text(result: dict[str, Any]) -> str:
    """STS of the scored model, and its generation and further mteb tasks where it has them."""
    model = model_of(result)
    [section] = sections(result)
    rows = sts_rows(section, "model", model)
    parts = [f"STS of {model}, Spearman x 100.\n{aligned(rows)}"]
    if benchmark := result.get("mteb"):
        parts.append(f"mteb of {model}, main scores x 100.\n{aligned(mteb_rows(benchmark))}")
    if generated := result.get("generation"):
        table = _generation_table("model", {model: generated}, generated["metrics"])
        parts.append(f"Generation of {model}, read causally, percent.\n{table}")
    return "\n\n".join(parts)


def _generation_table(
    what: str, rows: Mapping[str, dict[str, Any]], metrics: Mapping[str, str]
) -> str:
    """A row each: the main metric of each task ± its standard error, their average, perplexity."""
    body = []
    for label, scores in rows.items():
        errors = scores.get("stderr", {})  # older results have none
        tasks = [
            f"{scores['tasks'][name][metric]:.2f}"
            + (f" ±{errors[name]:.2f}" if name in errors else "")
            for name, metric in metrics.items()
        ]
        average = "not run" if scores["average"] is None else f"{scores['average']:.2f}"
        body.append([label, *tasks, average, f"{scores['perplexity']:.2f}"])
    return aligned([[what, *metrics, "average", "perplexity"], *body])


def generation_text(result: dict[str, Any]) -> str:
    """Tasks and perplexity by route, then STS by route and mask."""
    section, model = result["generation"], Path(result["config"]["model"]["name"]).name
    table = _generation_table("route", section["routes"], section["metrics"])
    parts = [f"Generation of the mixture on {model}, percent.\n{table}"]
    if sts := sections(result):
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
    table = _generation_table("variant", {section["variant"]: section}, section["metrics"])
    return f"Bitune on {model}, percent.\n{table}"


def probing_text(result: dict[str, Any]) -> str:
    """A row a task and split, a column a model."""
    models = result["probing"]["models"]
    return f"{probes_caption(models)}\n{aligned(probing_rows(models, 'balanced_accuracy'))}"


def probing_rows(
    models: list[dict[str, Any]],
    binary: str,
    beside: Callable[[dict[str, Any], str], str] = lambda *_: "",
) -> list[list[str]]:
    """Header and a row a task and split: score ± standard error, by model.

    binary: the metric of tasks with two classes; the others have Spearman's. beside: what stands
    behind the score of a row of a label's.
    """
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for model in models:
        for row in model["rows"]:
            if is_shown(row, models):
                metric = binary if binary in row else "spearman"
                cell = f"{row[metric]:.3f} ±{row[f'{metric}_stderr']:.3f}"
                line = cells.setdefault((probed(row), row["split"], metric), {})
                line[model["label"]] = cell + beside(row, model["label"])
    labels = [model["label"] for model in models]
    body = [
        [*key, *(line.get(label, "not run") for label in labels)] for key, line in cells.items()
    ]
    return [["task", "split", "metric", *labels], *body]


def probes_caption(models: list[dict[str, Any]]) -> str:
    first, last = models[0]["rows"][0], models[0]["rows"][-1]
    return f"Probes: {last['probe']}, of layer {first['layer']} (-1: the last)."


def is_shown(row: dict[str, Any], models: list[dict[str, Any]]) -> bool:
    """No control, at the first position, of the first layer and the last kind of probe."""
    first, last = models[0]["rows"][0], models[0]["rows"][-1]
    shown = (row["control"], row["position"], row["layer"], row["probe"])
    return shown == ("none", first["position"], first["layer"], last["probe"])


def probed(row: dict[str, Any]) -> str:
    """The task, and how the two words of a pair were combined."""
    return row["task"] + (f" ({row['features']})" if row["features"] != "word" else "")


def scan_rows(section: dict[str, Any], pooling: str = "mean") -> list[list[str]]:
    """Header and a row for each pattern, best first: the score, and its gain over none.

    Where vectors were centred, the score of these.
    """
    ordered = sorted(section["patterns"], key=lambda pattern: -pattern[pooling]["score"])
    body = [
        [
            pattern_name(pattern),
            f"{score['score']:.2f}",
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*gain),
        ]
        + ([f"{score['centred']:.2f}"] if "centred" in score else [])
        for pattern in ordered
        for score in [pattern[pooling]]
        for gain in [(score["gain"], *score["interval"])]
    ]
    more = ["centred"] if any("centred" in pattern[pooling] for pattern in ordered) else []
    return [["bidirectional layers", "Spearman x 100", "above none (95 %)", *more], *body]


def pattern_name(row: dict[str, Any]) -> str:
    """The layers of a scan's row, and how they read the first token where the scan varied that."""
    first = row.get("first_token", "full")
    return row["name"] + ("" if first == "full" or row["name"] == "none" else f", first {first}")


def has_forms(section: dict[str, Any]) -> bool:
    """Whether a scan read its pairs in forms that it names; older ones did not."""
    return "form" in section["patterns"][0]


def scan_form_rows(section: dict[str, Any], most: int) -> list[list[str]]:
    """Header and the `most` best patterns of each form, with none and all, by any pooling.

    A cell is Spearman x 100, and behind a slash that of the centred vectors, where these are there.
    """
    first = section["patterns"][0]
    poolings = [
        name for name, value in first.items() if isinstance(value, dict) and "score" in value
    ]
    words = [name.replace("_", " ") for name in poolings]
    body: list[list[str]] = []
    for form in dict.fromkeys(pattern["form"] for pattern in section["patterns"]):
        of_form = [pattern for pattern in section["patterns"] if pattern["form"] == form]
        best = sorted(
            of_form, key=lambda pattern: -max(pattern[name]["score"] for name in poolings)
        )
        shown = [pattern for pattern in best if pattern in best[:most] or pattern in of_form[:2]]
        body += [
            [form, pattern_name(pattern), *(_scan_cell(pattern[name]) for name in poolings)]
            for pattern in shown
        ]
    return [["form", "bidirectional layers", *words], *body]


def _scan_cell(score: dict[str, Any]) -> str:
    return f"{score['score']:.2f}" + (f" / {score['centred']:.2f}" if "centred" in score else "")


def scan_text(result: dict[str, Any]) -> str:
    section = result["scan"]
    caption = f"{model_of(result)} without training, {section['pairs']} pairs of {section['task']}"
    if has_forms(section):
        behind = "; behind a slash centred" if result["config"]["scan"]["centre"] else ""
        table = aligned(scan_form_rows(section, len(section["patterns"])))
        return f"{caption}, Spearman x 100{behind}.\n{table}"
    return f"{caption}, mean pooling.\n{aligned(scan_rows(section))}"


def swap_rows(section: dict[str, Any]) -> list[list[str]]:
    """Header and a row a layer: the cost of putting it in, and the saving of putting it back."""
    body = [
        [str(row["layer"]), *(_change(row[word]) for word in ("in", "back"))]
        for row in section["layers"]
    ]
    return [["layer", "encoder's, in the model", "model's, in the encoder"], *body]


def _change(change: dict[str, Any]) -> str:
    return "{:+.4f} ({:+.4f} to {:+.4f})".format(change["change"], *change["interval"])


def swap_text(result: dict[str, Any]) -> str:
    section = result["swap"]
    caption = "Perplexity of {base:.2f}, of its encoder {encoder:.2f}".format(
        **section["perplexity"]
    )
    return (
        f"{model_of(result)}: {caption} ({section['chats']} chats). One layer swapped, change of "
        f"the loss in nats a token (95 %):\n{aligned(swap_rows(section))}"
    )


def shift_rows(section: dict[str, Any]) -> list[list[str]]:
    """Header and a row a reading: its perplexity, and its attention shares in percent."""
    shares = ("used", "first", "after")
    body = [
        [name, *(f"{reading[column]:.2f}" for column in ("perplexity", *shares))]
        for name, reading in section["readings"].items()
    ]
    return [["", "perplexity", "first, as used", "first", "DP-after"], *body]


def shift_text(result: dict[str, Any]) -> str:
    section = result["shift"]
    caption = "its encoder, and each with the other's share of the first token, in and back"
    changes = [
        ", ".join(filter(None, (f"{name} {_change(change)}", part_of_whole(change))))
        for name, change in section["changes"].items()
    ]
    best = ""
    if "temperature" in section:  # a later control
        best = f"\nTemperature of the encoder's logits: {section['temperature']:.2f}."
    return (
        f"{model_of(result)}, {caption} ({section['chats']} chats):\n"
        f"{aligned(shift_rows(section))}\n"
        f"Change of the loss in nats a token (95 %): {'; '.join(changes)}.{best}"
    )


def part_of_whole(change: Mapping[str, Any]) -> str:
    """The part of the encoder's loss, with its interval; empty where there is none."""
    if (part := change.get("of_whole")) is None:
        return ""
    return "{:.0%} ({:.0%} to {:.0%})".format(part["part"], *part["interval"])


TEXT = {
    "dependence": dependence_text,
    "sts": sts_text,
    "generation": generation_text,
    "bitune": bitune_text,
    "probing": probing_text,
    "evaluation": evaluation_text,
    "scan": scan_text,
    "swap": swap_text,
    "shift": shift_text,
}


def aligned(rows: list[list[str]], form: str = "plain") -> str:
    """Right-aligned columns of a terminal, or another form of tabulate's; no cell is a number."""
    right = ["right"] * len(rows[0])
    return tabulate(rows[1:], rows[0], tablefmt=form, disable_numparse=True, colalign=right)


def model_of(record: dict[str, Any]) -> str:
    """The model's name: its last part, and its adapters'."""
    settings = record["config"]["model"] if "config" in record else {"name": ""}
    given = settings.get("adapter") or []
    adapters = [Path(path).name for path in ([given] if isinstance(given, str) else given)]
    return Path(settings["name"]).name + (f" with {' and '.join(adapters)}" if adapters else "")
