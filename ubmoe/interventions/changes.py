"""What the readings of an exchange change, with intervals by the bootstrap over chats."""

from typing import Any

import numpy as np

from ubmoe.bootstrap import interval, means

# Each change: the reading, and the one that it is over.
OVER = {
    "whole": ("encoder", "model"),
    "in": ("in", "model"),
    "in elsewhere": ("in elsewhere", "model"),
    "back": ("back", "encoder"),
    "back elsewhere": ("back elsewhere", "encoder"),
}


def changes(readings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{name of OVER: nats a token with a 95 % interval}, and `by_answer` each chat's mean once.

    `of_whole`: the part of what the encoder loses that an exchange into the model loses, or one
    into the encoder saves; None unless it surely loses anything.
    """
    lost = {name: np.array(each["answers"]["losses"]) for name, each in readings.items()}
    tokens = np.array(readings["model"]["answers"]["tokens"])
    told = _changes(lost, tokens)
    by_answer = {name: own / tokens for name, own in lost.items()}
    for name, cells in _changes(by_answer, np.ones_like(tokens)).items():
        told[name]["by_answer"] = cells
    return told


def _changes(lost: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, dict[str, Any]]:
    """lost: by reading, (chats,)."""
    moved = np.stack([lost[reading] - lost[over] for reading, over in OVER.values()])
    exact, drawn = moved.sum(1) / tokens.sum(), means(moved, tokens)
    ends = [interval(each) for each in drawn.T]
    found: dict[str, dict[str, Any]] = {}
    for place, (name, (_, over)) in enumerate(OVER.items()):
        found[name] = {"change": float(exact[place]), "interval": ends[place]}
        if place:
            found[name]["of_whole"] = None
            if ends[0][0] > 0:
                sign = -1 if over == "encoder" else 1
                found[name]["of_whole"] = {
                    "part": float(sign * exact[place] / exact[0]),
                    "interval": interval(sign * drawn[:, place] / drawn[:, 0].clip(1e-9)),
                }
    return found
