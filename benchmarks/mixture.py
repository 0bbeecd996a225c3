"""Cost of the mixture, against the dense model and against training all of it.

python -m benchmarks.mixture

Qwen2.5-0.5B's layer shape with random weights. `floor` is the dense model with one more FFN added
in every layer: what two experts cost at least. Claims, interleaved medians at one thread: a forward
at top_k 2 takes <= 1.10 times the floor's, at top_k 1 <= 1.20 times the dense model's, a forced
route <= 1.05 times; decoding likewise; a step that trains the routers (AdamW) takes <= 0.70 times
the time and <= 0.6 times the peak memory of one that trains all of the same mixture. `stock` rows
show transformers' own ways to compute the experts, without a claim.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, Qwen2ForCausalLM

from benchmarks.common import medians, peak_of_child, qwen_layers, write
from ubmoe.config import Route
from ubmoe.moe import joining, routers, routes
from ubmoe.recording import peak_memory_bytes
from ubmoe.training.losses import mean_loss, predictions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
LAYERS = 24 if DEVICE.type == "cuda" else 4
ROWS, TOKENS = 4, 256  # of a forward and of a training step
PREFIX, DECODED = 64, 32  # tokens before decoding, and tokens decoded
REPEATS = 5
LIMITS = {"top_k 2": 1.10, "top_k 1": 1.20, "uni": 1.05, "bi": 1.05, "step": 0.70, "memory": 0.6}
STOCK = ("grouped_mm", "eager")


class TwoFFNs(nn.Module):
    """The sum of two FFNs."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, deepcopy(first)

    def forward(self, states: Tensor) -> Tensor:
        return self.first(states) + self.second(states)


def dense() -> PreTrainedModel:
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(qwen_layers(LAYERS))
    cast(nn.Module, model).to(DEVICE, DTYPE)
    return model.eval()


def floor() -> PreTrainedModel:
    model: Any = dense()
    for layer in model.model.layers:
        layer.mlp = TwoFFNs(layer.mlp)
    return model


def mixture(top_k: int = 2, route: Route = "learned", stock: str | None = None) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        joining.mixture_config(qwen_layers(LAYERS), top_k)
    )
    model.to(DEVICE, DTYPE).eval()
    routers.start_routers(model, seed=0)
    routes.set_route(model, route)
    if stock is not None:
        model.set_experts_implementation(stock)
    return model


BUILDS: dict[str, Callable[[], Any]] = {
    "dense": dense,
    "floor": floor,
    "top_k 2": mixture,
    "top_k 1": partial(mixture, 1),
    "uni": partial(mixture, 2, "uni"),
    "bi": partial(mixture, 2, "bi"),
    **{f"top_k 2, stock {name}": partial(mixture, 2, "learned", name) for name in STOCK},
    **{f"top_k 1, stock {name}": partial(mixture, 1, "learned", name) for name in STOCK},
}


@torch.no_grad()
def forward(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1024, (ROWS, TOKENS), generator=generator).to(DEVICE)
    model.model(input_ids=ids, use_cache=False)


@torch.no_grad()
def decode(model: Any) -> None:
    ids = torch.arange(PREFIX, device=DEVICE)[None]
    cache = DynamicCache(config=model.config)
    for _ in range(DECODED):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = output.logits[:, -1].argmax(-1, keepdim=True)


class Step:
    """A training step of the mixture: of its routers, or of everything."""

    def __init__(self, everything: bool) -> None:
        self.model = mixture()
        self.model.requires_grad_(everything).train()
        for value in routers.router_weights(self.model).values():
            value.requires_grad = True
        trainable = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, 1e-4)
        self.ids = torch.randint(1024, (ROWS, TOKENS), device=DEVICE)

    def __call__(self) -> None:
        inputs = {"input_ids": self.ids}
        mean_loss(*predictions(self.model, self.model.lm_head, inputs, self.ids)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


STEPS = {"routers": partial(Step, False), "everything": partial(Step, True)}


def row(claim: str, over: str, value: float, limit: float | None) -> dict[str, object]:
    holds = "no claim" if limit is None else "yes" if value <= limit else "no"
    shown = "none" if limit is None else f"<= {limit:.2f}"
    return {"claim": claim, "over": over, "ratio": value, "limit": shown, "holds": holds}


def inference(what: str, run: Callable[[Any], None]) -> list[dict[str, object]]:
    models = {name: build() for name, build in BUILDS.items()}
    seconds = medians({name: partial(run, model) for name, model in models.items()}, REPEATS)
    rows = []
    for name in list(BUILDS)[2:]:
        over = "floor" if name.startswith("top_k 2") else "dense"
        ratio = seconds[name] / seconds[over]
        rows.append(row(f"{what}, {name}", over, ratio, LIMITS.get(name)))
    return rows


def training() -> list[dict[str, object]]:
    seconds = medians({name: build() for name, build in STEPS.items()}, REPEATS)
    peaks = {name: peak_of_child("benchmarks.mixture", name) for name in STEPS}
    time = seconds["routers"] / seconds["everything"]
    memory = peaks["routers"] / peaks["everything"]
    return [
        row("router step, time", "full step", time, LIMITS["step"]),
        row("router step, peak memory", "full step", memory, LIMITS["memory"]),
    ]


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:  # a child: two steps, for their peak memory
        step = STEPS[sys.argv[1]]()
        step()
        step()
        print(peak_memory_bytes())
        return
    rows = [*inference("forward", forward), *inference("decoding", decode), *training()]
    settings = {"layers": LAYERS, "rows": ROWS, "tokens": TOKENS, "repeats": REPEATS}
    write("mixture", rows, settings=settings | {"prefix": PREFIX, "decoded": DECODED})


if __name__ == "__main__":
    main()
