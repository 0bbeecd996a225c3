"""Cost of Bitune: training in batches, the prefill, and decoding with merged adapters.

python -m benchmarks.bitune

Random weights, LoRA of rank 8, interleaved medians at one thread. Claims: training on length-sorted
batches of 8 does >= 1.5 times the tokens per second of the original's batches of 1 on the same
examples at hidden 128 (other sizes are shown); Bitune's prefill of 256 tokens takes <= 1.15 times
two plain ones at Qwen2.5-0.5B's layer shape; with the causal adapter merged, decoding has >= 0.97
of the base model's speed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import medians, qwen_layers, write
from ubmoe.bitune import model as prefill
from ubmoe.config import BituneSection
from ubmoe.data.prompts import Example, batch
from ubmoe.training.losses import mean_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN = (64, 128, 512)
CLAIMED = 128
EXAMPLES, BATCH = 64, 8
PROMPT, DECODED = 256, 48
REPEATS = 7
LAYERS = 24 if DEVICE.type == "cuda" else 4


def model(hidden: int | None = None) -> Any:
    """A small decoder of this width, or Qwen2.5-0.5B's layers."""
    torch.manual_seed(0)
    config = qwen_layers(LAYERS)
    if hidden is not None:
        config = Qwen2Config(
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=4,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            vocab_size=1024,
        )
    built: Any = Qwen2ForCausalLM(config)
    return cast(nn.Module, built).to(DEVICE).eval()


def examples() -> list[Example]:
    """Prompts and answers of lengths that spread like those of instructions."""
    generator = torch.Generator().manual_seed(1)
    lengths = (torch.randn(EXAMPLES, 2, generator=generator) * 0.6).exp()
    rows = []
    for p, a in (lengths * torch.tensor([40.0, 30.0])).int().clamp(2, 200).tolist():
        ids = torch.randint(1024, (p + a,), generator=generator).tolist()
        rows.append(Example(ids[:p], ids[p:]))
    return sorted(rows, key=len)


class Training:
    """Optimizer steps over the examples, each of BATCH of them in batches of `size`."""

    def __init__(self, hidden: int, size: int) -> None:
        self.bitune = prefill.attach(model(hidden), BituneSection(), seed=0)
        trains = [value for value in self.bitune.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(trains, 1e-4)
        self.size, self.rows = size, examples()

    def __call__(self) -> None:
        for start in range(0, EXAMPLES, BATCH):
            step = self.rows[start : start + BATCH]
            for place in range(0, BATCH, self.size):
                inputs = batch(step[place : place + self.size])
                inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
                (mean_loss(*self.bitune(**inputs)) * self.size / BATCH).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def training() -> list[dict[str, object]]:
    tokens = sum(map(len, examples()))
    rows = []
    for hidden in HIDDEN:
        runs: dict[str, Callable[[], object]] = {
            str(size): Training(hidden, size) for size in (BATCH, 1)
        }
        seconds = medians(runs, 3)
        speed = {size: tokens / taken for size, taken in seconds.items()}
        limit = 1.5 if hidden == CLAIMED else None
        names = (f"training tokens/s, hidden {hidden}", "batch 8 / batch 1")
        rows.append(row(*names, speed["8"] / speed["1"], limit, above=True))
    return rows


@torch.no_grad()
def plain_prefills(base: Any, ids: torch.Tensor) -> None:
    for _ in range(2):
        base(input_ids=ids, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def our_prefill(bitune: prefill.Bitune, ids: torch.Tensor) -> None:
    bitune.prefill(ids, torch.ones_like(ids))


@torch.no_grad()
def decode(decoder: Any, answering: Any) -> None:
    ids = torch.arange(32, device=DEVICE)[None]
    cache = DynamicCache(config=decoder.config)
    with answering():
        for _ in range(DECODED):
            output = decoder(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = output.logits[:, -1].argmax(-1, keepdim=True)


def inference() -> list[dict[str, object]]:
    base, ids = model(), torch.arange(PROMPT, device=DEVICE)[None]
    separate = prefill.attach(model(), BituneSection(), seed=0).eval()
    merged = prefill.merged(prefill.attach(model(), BituneSection(), seed=0))
    runs: dict[str, Callable[[], object]] = {
        "plain": partial(plain_prefills, base, ids),
        "separate": partial(our_prefill, separate, ids),
        "merged": partial(our_prefill, merged, ids),
    }
    seconds = medians(runs, REPEATS)
    rows = [
        row("prefill, adapters merged", "two plain", seconds["merged"] / seconds["plain"], 1.15),
        row("prefill, adapters apart", "two plain", seconds["separate"] / seconds["plain"], None),
    ]
    decodes: dict[str, Callable[[], object]] = {
        "base": partial(decode, base, torch.no_grad),
        "merged": partial(decode, merged.decoder, merged.answering),
        "separate": partial(decode, separate.decoder, separate.answering),
    }
    seconds = medians(decodes, REPEATS)
    for name, limit in (("merged", 0.97), ("separate", None)):
        claim = f"decoding tokens/s, adapters {'merged' if name == 'merged' else 'apart'}"
        rows.append(row(claim, "base", seconds["base"] / seconds[name], limit, above=True))
    return rows


def row(
    claim: str, over: str, value: float, limit: float | None, above: bool = False
) -> dict[str, object]:
    holds, shown = "no claim", "none"
    if limit is not None:
        holds = "yes" if (value >= limit if above else value <= limit) else "no"
        shown = f"{'>=' if above else '<='} {limit}"
    return {"claim": claim, "over": over, "ratio": value, "limit": shown, "holds": holds}


def main() -> None:
    torch.set_num_threads(1)
    rows = [*training(), *inference()]
    settings = {"layers": LAYERS, "examples": EXAMPLES, "prompt": PROMPT, "decoded": DECODED}
    write("bitune", rows, settings=settings | {"repeats": REPEATS})


if __name__ == "__main__":
    main()
