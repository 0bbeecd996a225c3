"""Changes of the loss by an exchange, with intervals by the bootstrap over chats."""

from typing import Any

import numpy as np

from ubmoe.bootstrap import interval, means

# Each change: the reading, and the one that it is over.
OVER = {
    "whole": ("encoder", "model"),
    "in": ("in", "model"),
    "in elsewhere": ("in elsewhere", "model"),
    "in scaled": ("in scaled", "model"),
    "back": ("back", "encoder"),
    "back elsewhere": ("back elsewhere", "encoder"),
    "back scaled": ("back scaled", "encoder"),
    "temperature": ("temperature", "encoder"),
    "back over scaled": ("back", "back scaled"),
    "back over temperature": ("back", "temperature"),
}
INTO_MODEL = ("in", "in elsewhere", "in scaled")  # what these add is lost; the others save


def changes(readings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{name of OVER: nats a token with a 95 % interval}, and `by_answer` each chat's mean once.

    `of_whole`: the part of what the encoder loses that a change of the model loses, or one of the
    encoder saves; None unless it surely loses anything. `back over` a control: what the exchange
    saves beyond that.
    """
    lost = {name: np.array(reading["answers"]["losses"]) for name, reading in readings.items()}
    tokens = np.array(readings["model"]["answers"]["tokens"])
    result = _changes(lost, tokens)
    by_answer = {name: losses / tokens for name, losses in lost.items()}
    for name, cells in _changes(by_answer, np.ones_like(tokens)).items():
        result[name]["by_answer"] = cells
    return result


def _changes(lost: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, dict[str, Any]]:
    """lost: by reading, (chats,)."""
    moved = np.stack([lost[reading] - lost[over] for reading, over in OVER.values()])
    exact, drawn = moved.sum(1) / tokens.sum(), means(moved, tokens)
    ends = [interval(draws) for draws in drawn.T]
    result: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(OVER):
        result[name] = {"change": float(exact[place]), "interval": ends[place]}
        if place:
            result[name]["of_whole"] = None
            if ends[0][0] > 0:
                sign = 1 if name in INTO_MODEL else -1
                result[name]["of_whole"] = {
                    "part": float(sign * exact[place] / exact[0]),
                    "interval": interval(sign * drawn[:, place] / drawn[:, 0].clip(1e-9)),
                }
    return result
