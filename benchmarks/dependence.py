"""Time and memory of measuring dependence, against a plain forward and against the paper's way.

python -m benchmarks.dependence

Qwen2.5-0.5B's layer shape with random weights; `plain` is the causal sdpa forward, `paper`
accumulates full T x T maps over the layers as the released code does, `ours` streams. Claims, at T
= 2048 and one thread: ours / plain <= 1.30 (1.35 in bfloat16, where the processor has it), paper /
ours >= 1.25, memory of ours above plain <= 100 MB and at most a tenth of the paper's, growing
linearly to T = 8192. On CUDA, in bfloat16: ours / plain <= 1.30 at 2048, and 1.70 at 32,768.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2ForCausalLM
from transformers.masking_utils import eager_mask

from benchmarks.common import medians, peak_of_child, qwen_layers, write
from ubmoe.dependence.recorder import Recorder, dependence_of, observed
from ubmoe.models.precision import has_bfloat16
from ubmoe.recording import peak_memory_bytes

LAYERS = 4
REPEATS = 5
PAPER_TOKENS = 4096  # beyond, the paper's maps of 14 x T x T x 4 bytes each do not fit everywhere
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEGABYTE = 1e6
DTYPE = "bfloat16" if DEVICE.type == "cuda" else "float32"
LIMITS = {  # of ours / plain, by device, dtype, tokens and threads
    ("cpu", "float32", 2048, 1): 1.30,
    ("cpu", "bfloat16", 2048, 1): 1.35,
    ("cuda", "bfloat16", 2048, 1): 1.30,
    ("cuda", "bfloat16", 32768, 1): 1.70,
}


class Paper:
    """The released code's way: the unmasked softmax of every layer, added up as one (H, T, T)
    tensor.
    """

    def __init__(self) -> None:
        self.total = torch.zeros((), device=DEVICE)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        scaling: float,
        **_: object,
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * scaling
        self.total = self.total + scores.softmax(-1, dtype=torch.float32)[0]
        output = (scores + mask).softmax(-1, dtype=torch.float32).to(query.dtype) @ value
        return output.transpose(1, 2).contiguous(), None


def build(dtype: str) -> Qwen2ForCausalLM:
    model: Any = Qwen2ForCausalLM(qwen_layers(LAYERS))
    return model.to(DEVICE, getattr(torch, dtype)).eval()


@torch.no_grad()
def plain(model: Qwen2ForCausalLM, ids: Tensor) -> None:
    model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def ours(model: Qwen2ForCausalLM, ids: Tensor) -> Tensor:
    with observed(model) as recorder:
        return triple(model, recorder, ids)


def triple(model: Qwen2ForCausalLM, recorder: Recorder, ids: Tensor) -> Tensor:
    return dependence_of(model, recorder, ids, torch.ones_like(ids))[0, ..., :3].mean((0, 1))


@torch.no_grad()
def paper(model: Qwen2ForCausalLM, ids: Tensor) -> Tensor:
    way = Paper()
    AttentionInterface.register("paper", way)
    AttentionMaskInterface.register("paper", eager_mask)
    model.set_attn_implementation("paper")
    plain(model, ids)
    model.set_attn_implementation("sdpa")
    mean = way.total.sum(0) / LAYERS / model.config.num_attention_heads  # (T, T)
    return torch.stack((mean.trace(), mean.tril(-1).sum(), mean.triu(1).sum())).cpu() / len(mean)


WAYS = {"plain": plain, "ours": ours, "paper": paper}


def row(tokens: int, threads: int, dtype: str) -> dict[str, object]:
    """One length: seconds, ratios, megabytes above the plain forward, and how far ours and the
    paper's numbers lie apart.
    """
    torch.set_num_threads(threads)
    model, ids = build(dtype), torch.randint(1024, (1, tokens), device=DEVICE)
    repeats = REPEATS if tokens <= PAPER_TOKENS else 3
    ways = {name: way for name, way in WAYS.items() if name != "paper" or tokens <= PAPER_TOKENS}
    watched = deepcopy(model)
    with observed(watched) as recorder:  # once a run, its proof too
        runs: dict[str, Callable[[], object]] = {
            name: partial(way, model, ids) for name, way in ways.items()
        }
        runs["ours"] = partial(triple, watched, recorder, ids)
        seconds = medians(runs, repeats)
    child = ("benchmarks.dependence",)
    peaks = {name: peak_of_child(*child, name, tokens, threads, dtype) for name in ways}
    ratio = seconds["ours"] / seconds["plain"]
    limit = LIMITS.get((DEVICE.type, dtype, tokens, threads))
    cells: dict[str, object] = {"tokens": tokens, "threads": threads, "dtype": dtype}
    cells |= {"plain_s": seconds["plain"], "ours/plain": ratio}
    cells["limit"] = "none" if limit is None else f"<= {limit:.2f}"
    cells["holds"] = "no claim" if limit is None else "yes" if ratio <= limit else "no"
    cells["ours_above_MB"] = (peaks["ours"] - peaks["plain"]) / MEGABYTE
    names = ("paper/plain", "paper/ours", "paper_above_MB", "difference")
    if "paper" not in ways:
        return cells | dict.fromkeys(names, "not run")
    difference = (ours(model, ids) - paper(model, ids).double()).abs().max().item()
    above = (peaks["paper"] - peaks["plain"]) / MEGABYTE
    ratios = (seconds["paper"] / seconds["plain"], seconds["paper"] / seconds["ours"])
    return cells | dict(zip(names, (*ratios, above, f"{difference:.0e}"), strict=True))


def main() -> None:
    if len(sys.argv) > 1:  # a child: one way, once, for its peak memory
        name, tokens, threads, dtype = sys.argv[1:]
        torch.set_num_threads(int(threads))
        WAYS[name](build(dtype), torch.randint(1024, (1, int(tokens)), device=DEVICE))
        print(peak_memory_bytes())
        return
    lengths = (2048, 8192, 32768) if DEVICE.type == "cuda" else (1024, 2048, 4096, 8192)
    cases = [(tokens, 1, DTYPE) for tokens in lengths]
    if DEVICE.type == "cpu":
        cases += [(2048, 2, DTYPE)] + [(2048, 1, "bfloat16")] * has_bfloat16(DEVICE)
    write("dependence", [row(*case) for case in cases])


if __name__ == "__main__":
    main()
