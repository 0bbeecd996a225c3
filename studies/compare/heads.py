"""Whether single heads turn to later tokens where their mean does not, and how far they move."""

import numpy as np

from studies.compare.paired import texts
from ubmoe.results.records import Record

TOWARDS_LATER = "heads turned to later tokens"
MOVED = "heads moved"
HEADS = {
    TOWARDS_LATER: "a head's rise of DP-after without the first key, falls as 0",
    MOVED: "a head's change of DP-after, up or down",
}


def head_changes(tuned: Record | None, base: Record | None) -> dict[str, float]:
    """{column of HEADS: mean over all heads of what tuning does to one, in percentage points}.

    A mean of DP-after hides heads that turn to later tokens where others turn away; these means do
    not. {} where heads were not measured, or not surely of the base's texts.
    """
    if tuned is None or base is None or not _alike(tuned, base):
        return {}
    mine, theirs = _heads(tuned), _heads(base)
    if mine is None or theirs is None:
        return {}
    after, without = mine - theirs
    return {TOWARDS_LATER: float(np.maximum(without, 0).mean()), MOVED: float(np.abs(after).mean())}


def _alike(tuned: Record, base: Record) -> bool:
    """Whether both say of which texts they are, and of the same."""
    return texts(tuned) == texts(base) and texts(tuned)[1] is not None


def _heads(record: Record) -> np.ndarray | None:
    """(2, heads) of DP-after, with the first token's key and without; None of an older record."""
    layers = record.section.get("layers", ())
    every = [head for layer in layers for head in layer.get("heads", ())]
    if not every or not all("without_first" in head for head in every):
        return None
    return np.array([(head["after"], head["without_first"]["after"]) for head in every]).T
