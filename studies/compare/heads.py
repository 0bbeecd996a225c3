"""Whether single heads turn to later tokens where their mean does not, and how far they move."""

import numpy as np

from studies.compare.paired import texts
from ubmoe.results.records import Record

AHEAD = "heads turned ahead"
MOVED = "heads moved"
HEADS = {
    AHEAD: "a head's rise of DP-after without the first key, falls as 0",
    MOVED: "a head's change of DP-after, up or down",
}


def turned(own: Record | None, base: Record | None) -> dict[str, float]:
    """{column of HEADS: mean over all heads of what tuning does to one, in percentage points}.

    A mean of DP-after hides heads that turn to later tokens where others turn away; these means do
    not. {} where heads were not measured, or not surely of the base's texts.
    """
    if own is None or base is None or not _alike(own, base):
        return {}
    mine, theirs = _heads(own), _heads(base)
    if mine is None or theirs is None:
        return {}
    after, without = mine - theirs
    return {AHEAD: float(np.maximum(without, 0).mean()), MOVED: float(np.abs(after).mean())}


def _alike(own: Record, base: Record) -> bool:
    """Whether both say of which texts they are, and of the same."""
    return texts(own) == texts(base) and texts(own)[1] is not None


def _heads(record: Record) -> np.ndarray | None:
    """(2, heads) of DP-after, with the first token's key and without; None of an older record."""
    layers = record.section.get("layers", ())
    every = [head for layer in layers for head in layer.get("heads", ())]
    if not every or not all("without_first" in each for each in every):
        return None
    return np.array([(each["after"], each["without_first"]["after"]) for each in every]).T
