"""The picture of the attention sink: norms of the first token's state by layer, a panel a model.

The massive activation that the sink stands on is formed where the first token sees itself alone.
"""

from typing import Any

from studies.compare.records import Records
from ubmoe.report.figures import PALETTE, blank, styled
from ubmoe.report.tables import model_of

STYLES: dict[str, tuple[str, Any, float]] = {  # the sink kept lies on the causal line: thin dashes
    "causal": (PALETTE[0], "-", 2.6),
    "sink kept": (PALETTE[4], (0, (2, 2)), 1.4),
    "bidirectional": (PALETTE[1], "-", 1.8),
}


def by_model(records: Records) -> dict[str, dict[str, Any]]:
    """{model: {mask: norms of `first` tokens and of `others` by layer}}, of untouched models."""
    return {
        model_of(record.data).removesuffix(".gguf"): record.section["norms"]
        for record in records.of("dependence")
        if record.section.get("norms") and not record.config["bi"]["stages"]
    }


@styled
def figure(norms: dict[str, dict[str, Any]]) -> Any:
    """First tokens in the colour of their mask; grey: the other tokens of a causal reading."""
    drawn = blank(2.2 + 2.1 * len(norms), 3.2)
    panels = drawn.subplots(1, len(norms), sharey=True, squeeze=False)[0]
    for axes, (model, masks) in zip(panels, sorted(norms.items()), strict=True):
        for mask, (colour, style, width) in STYLES.items():
            if mask in masks:
                axes.plot(masks[mask]["first"], color=colour, ls=style, lw=width, label=mask)
        axes.plot(masks["causal"]["others"], color="grey", lw=1, label="other tokens, causal")
        axes.set(yscale="log", xlabel="layer (0: embeddings)")
        axes.set_title(model, fontsize=8)
    panels[0].set_ylabel("norm of the first token's state")
    keys = panels[0].get_legend_handles_labels()
    drawn.legend(*keys, loc="outside lower center", ncols=4)
    return drawn
