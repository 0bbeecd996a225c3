"""Operations of the hot loops on a device, and how often the host waits for it.

python -m benchmarks.operations [before]

Counted on a CPU by dispatch and function modes, so that no GPU is needed: an operation that is no
view is a launch on a GPU, and a wait empties its queue. A wait is a value that the host reads
(`.item()`, `.tolist()`, `.cpu()`, a tensor as a truth value) or a size that it has to learn
(`nonzero`, an index that is a mask). Small random models; the counts do not depend on widths.
`before`, run at another commit, writes operations.before.json, which later counts stand beside.
Claim: a layer of dependence takes at most 150 operations at any length.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.bitune import BATCH, examples
from benchmarks.common import write
from benchmarks.contrastive import SEED, batches
from benchmarks.contrastive import build as encoder
from benchmarks.probing import sentences
from ubmoe.bitune import model as prefill
from ubmoe.config import BituneSection
from ubmoe.data.chats import Chat, collate
from ubmoe.data.prompts import batch
from ubmoe.dependence import recorder
from ubmoe.encoder.contrastive_loss import ContrastiveLoss
from ubmoe.files import write_json
from ubmoe.moe import joining, router_training, routers, routes
from ubmoe.probing.word_vectors import word_vectors
from ubmoe.recording import git_commit
from ubmoe.training.losses import mean_loss, predictions

BEFORE = Path(__file__).with_name("operations.before.json")
LAYERS, HEADS = 4, 14
SCORES = 2**31  # bytes that dependence may take for scores, as on a GPU of which 8 GiB are free
LENGTHS = (2048, 8192)
BUDGETS = (2048, 16384)  # tokens of a contrastive mini-batch
CHATS, TOKENS = 8, 64
READS = ("cpu", "tolist", "item", "__bool__", "__int__", "__float__", "__index__")
SIZES = ("aten.nonzero", "aten.masked_select", "aten._unique", "aten.equal")


class Counts(TorchDispatchMode):
    """Operations, and among them those whose size the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0
        self.reads = _Reads(self)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.operations += 1
        name = str(function)
        indices = args[1] if name.startswith("aten.index.") else ()
        masked = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        self.waits += masked or name.startswith(SIZES)
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self.reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.reads.__exit__(*error)


class _Reads(TorchFunctionMode):
    """Counts what reads a value of a tensor; reading one within another is one wait."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.counts.waits += getattr(function, "__name__", "") in READS
        return function(*args, **(kwargs or {}))


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """(operations, waits)"""
    with Counts() as counts:
        run()
    return counts.operations, counts.waits


# --- the loops ------------------------------------------------------------------------------------


def decoder(layers: int = LAYERS) -> Any:
    torch.manual_seed(SEED)
    config = Qwen2Config(
        hidden_size=8 * HEADS,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 7,
        vocab_size=1024,
        max_position_embeddings=max(LENGTHS),
    )
    model: Any = Qwen2ForCausalLM(config)
    return model.eval()


def dependence(tokens: int) -> tuple[float, float]:
    """A layer of a text: what two layers more take, by two. Waits are those of the whole text."""
    recorder._spare = lambda device: SCORES
    counts = []
    for layers in (1, 3):
        model, ids = decoder(layers), torch.randint(1024, (1, tokens))
        with recorder.observed(model) as observer:
            run = partial(recorder.dependence_of, model, observer, ids, torch.ones_like(ids))
            counts.append(counted(run))
    (one, _), (three, waits) = counts
    return (three - one) / 2, waits


def contrastive(budget: int) -> tuple[int, int]:
    """A step of 64 pairs, forward and backward."""
    encoded, _ = encoder()
    loss = ContrastiveLoss(encoded, "nt_xent", 0.05, budget)
    columns = [dict(encoded.preprocess(column)) for column in next(batches(64))]
    loss(columns)  # that the views differ is looked at once
    return counted(lambda: loss(columns).backward())


def vectors() -> tuple[int, int]:
    """A batch of word vectors, every layer."""
    model, read = decoder(), sentences()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "vectors.npy"
        layers = list(range(LAYERS + 1))
        return counted(lambda: word_vectors(model, read, path, layers, 1 << 30, "one batch"))


def chats() -> list[Chat]:
    roles = [*["prompt"] * (TOKENS // 2), *["answer"] * (TOKENS // 2)]
    answer = [role == "answer" for role in roles]
    return [Chat("", list(range(row, row + TOKENS)), answer, roles) for row in range(CHATS)]


def mixture() -> Any:
    torch.manual_seed(SEED)
    model: Any = AutoModelForCausalLM.from_config(joining.mixture_config(decoder().config, 2))
    routers.start_routers(model.eval(), SEED)
    routes.set_route(model, "learned")
    return model


def router_step() -> tuple[int, int]:
    """A step that trains the routers and watches them, and what a log of it reads."""
    model, inputs = mixture(), collate(chats())
    labels = inputs.pop("labels")

    def step() -> None:
        watch.real = inputs["attention_mask"]
        mean_loss(*predictions(model, model.get_output_embeddings(), inputs, labels)).backward()
        watch.metrics()

    with router_training._watching(model) as watch:
        return counted(step)


def router_shares() -> tuple[int, int]:
    """The routers' weight of the bi expert, over chats."""
    model, read = mixture(), chats()
    return counted(lambda: routers.shares_by_role(model, read))


def fitted() -> tuple[int, int]:
    """`router_init: uni` fitted on chats."""
    model, texts = mixture(), [torch.tensor([chat.ids]) for chat in chats()]
    return counted(lambda: routers.fit_routers(model, texts))


def bitune() -> tuple[int, int]:
    """A training step: two passes over the prompts, one over the answers, and backward."""
    tuned = prefill.attach(decoder(), BituneSection(), seed=0)
    inputs = batch(examples()[:BATCH])
    return counted(lambda: mean_loss(*tuned(**inputs)).backward())


LOOPS: dict[str, Callable[[], tuple[float, float]]] = {
    **{f"dependence, a layer, {n} tokens": partial(dependence, n) for n in LENGTHS},
    **{f"contrastive step, mini-batches of {n}": partial(contrastive, n) for n in BUDGETS},
    "router step, watched and logged": router_step,
    f"routers' shares of {CHATS} chats": router_shares,
    f"routers fitted on {CHATS} chats": fitted,
    "word vectors, a batch, all layers": vectors,
    "Bitune, a training step": bitune,
}
LIMIT = 150  # operations of a layer of dependence


def row(loop: str, before: dict[str, float], now: tuple[float, float]) -> dict[str, object]:
    limit = f"<= {LIMIT}" if loop.startswith("dependence") else "none"
    holds = "no claim" if limit == "none" else "yes" if now[0] <= LIMIT else "no"
    return {
        "loop": loop,
        "operations before": int(before["operations"]),
        "operations": int(now[0]),
        "waits before": int(before["waits"]),
        "waits": int(now[1]),
        "limit": limit,
        "holds": holds,
    }


def main() -> None:
    torch.set_num_threads(1)
    counts = {loop: run() for loop, run in LOOPS.items()}
    if sys.argv[1:] == ["before"]:
        loops = {name: {"operations": n, "waits": waits} for name, (n, waits) in counts.items()}
        write_json(BEFORE, {"git_commit": git_commit(), "torch": torch.__version__, "loops": loops})
        return
    before = json.loads(BEFORE.read_text())
    rows = [row(loop, before["loops"][loop], now) for loop, now in counts.items()]
    write("operations", rows, before=before)


if __name__ == "__main__":
    main()
