"""The table of word-level probing, beside published numbers of another model."""

from collections.abc import Sequence
from typing import Any

from studies.compare.labels import markdown
from studies.compare.probed import probings
from studies.compare.published import published
from studies.compare.records import Records
from ubmoe.report.tables import probed, probes_caption, probing_rows

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


def probing_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row a task and split, a column a model, published numbers in brackets.

    name: of a run that probed several, or of a model: then of it, and of what was tuned from it.
    The published ones are of another family, at the same stage of training, and of the random or
    the shipped splits.
    """
    probed_alone = records.of("probing", label=name)
    tables = [(record.section["models"], record) for record in probed_alone]
    if not probed_alone and (study := probings(name, records, seeds)):
        tables = [([model for record in study for model in record.section["models"]], study[0])]
    return "\n\n".join(
        _probing_table(models, record.config["probing"]["data"] == "tiny")
        for models, record in tables
    )


def _probing_table(models: list[dict[str, Any]], tiny: bool) -> str:
    """tiny: the little language's own tasks, of which nothing is published."""

    def beside(row: dict[str, Any], label: str) -> str:
        if tiny or row["split"] == "lemma":
            return ""
        theirs = _published_probe(probed(row), row["probe"], label)
        return "" if theirs is None else f" ({theirs:.3f})"

    table = f"{markdown(probing_rows(models, 'accuracy', beside))}\n\n{probes_caption(models)}"
    return table if tiny else f"{table} In brackets: published for {PUBLISHED_FAMILY}."


def _published_probe(task: str, probe: str, label: str) -> float | None:
    feature, at, word = task.partition("@")
    if at and probe != "mlp":
        return None  # the context tasks are published for MLPs alone
    if probe == "ridge":
        return None  # nor is any ridge
    name, column = ("context", f"word {word}") if at else PUBLISHED_PROBES[task]
    table = published("feng")[name if at else f"{name}_{probe}"]
    for row in table["rows"]:
        wanted = (PUBLISHED_FAMILY, label, feature if at else None)
        if (row["model"], row["method"], row.get("task")) == wanted:
            return row["scores"][table["columns"].index(column)]
    return None
