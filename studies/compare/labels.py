"""What tables of several runs call their rows, and a cell over seeds."""

import statistics
from typing import Any

from ubmoe.report.tables import aligned

# The forced routes; `uni` and `bi` are the two models themselves, without a mixture.
ROUTES = {
    "uni": "base (uni alone)",
    "bi": "bi alone",
    "mode": "modes (uni causal, bi bidirectional)",
    "half": "half of each",
    "average": "averaged weights",
}


def mixed(record: dict[str, Any], route: str) -> str:
    """The row of a mixture: a forced route, or how its routers were trained; and a study's name."""
    settings = record["config"]["ubmoe"]
    label = ROUTES.get(route, f"learned, top_k {settings['top_k']}, {settings['objective']}")
    row = record["config"].get("results", {}).get("row")
    if row and route != "uni":  # a study's own
        label = f"{label}, {row}"
    causal = record["generation"]["bi_attention"] == "causal" and route != "uni"
    return label + (", causally tuned expert" if causal else "")


def variant(record: dict[str, Any]) -> str:
    """Its name in the paper's tables: the baseline has as many parameters at twice the rank."""
    if row := record["config"].get("results", {}).get("row"):  # a study's own
        return str(row)
    settings, variant = record["config"]["bitune"], record["bitune"]["variant"]
    if settings["max_steps"] == 0:
        return "pretrained"
    return "lora rank 16" if variant == "lora" and settings["rank"] == 16 else variant


def spread(values: list[float]) -> str:
    """Mean, and with several values their standard deviation (n - 1)."""
    if not values:
        return "not run"
    error = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}"


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table, its first row the header."""
    return aligned(rows, "pipe")
