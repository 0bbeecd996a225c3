"""What a mask costs in a forward pass: causal, bidirectional, late layers alone, the sink kept.

python -m benchmarks.masks

Qwen2.5-0.5B's layer shape with random weights; 32 texts of 16 to 48 tokens, padded, as sentences
are, and one of 2,048. The masks take turns. Claims: with the sink kept, and with late layers, a
forward takes at most 1.10 times the plainly bidirectional one's time.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Model

from benchmarks.common import medians, qwen_layers, write
from ubmoe import layered
from ubmoe.bidirectional import masked

LAYERS, LATE, REPEATS, MOST = 6, 3, 7, 1.10
MASKS: dict[str, tuple[bool, dict[str, Any]]] = {
    "causal": (False, {}),
    "bidirectional": (True, {}),
    "late layers": (True, {layered.KEY: {"from": LATE}}),
    "sink kept": (True, {layered.SINK: True}),
}
LIMITED = ("late layers", "sink kept")


def sentences() -> dict[str, Tensor]:
    """Texts of unlike lengths, padded on the right."""
    lengths = torch.arange(16, 48)
    mask = (torch.arange(48) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1000, mask.shape) * mask, "attention_mask": mask}


def document() -> dict[str, Tensor]:
    ids = torch.randint(1000, (1, 2048))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def forward(model: Any, inputs: dict[str, Tensor], mask: str) -> None:
    bidirectional, keys = MASKS[mask]
    with masked(model, bidirectional, keys):
        model(**inputs, use_cache=False)


def main() -> None:
    torch.manual_seed(0)
    model: Any = Qwen2Model(qwen_layers(LAYERS)).eval()
    rows = []
    for name, inputs in (("32 sentences", sentences()), ("2,048 tokens", document())):
        seconds = medians({mask: partial(forward, model, inputs, mask) for mask in MASKS}, REPEATS)
        for mask in MASKS:
            ratio = seconds[mask] / seconds["bidirectional"]
            claimed = mask in LIMITED
            rows.append(
                {
                    **{"input": name, "mask": mask, "seconds": seconds[mask]},
                    **{"over_bidirectional": ratio, "limit": f"<= {MOST}" if claimed else "none"},
                    "holds": ("yes" if ratio <= MOST else "no") if claimed else "no claim",
                }
            )
    write("masks", rows)


if __name__ == "__main__":
    main()
