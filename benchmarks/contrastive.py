"""Speed, loss and memory of contrastive training, against the same training written plainly.

python -m benchmarks.contrastive

Random weights, bidirectional, the FFN trains; on a CPU two layers of half Qwen2.5-0.5B's width, on
CUDA its whole shape. Sentences are random words with lengths like Wikipedia's: log-normal, 27
tokens in the mean, 1 % above 76, cut at 128. `merged` is MultipleNegativesRankingLoss with
sentence-transformers' defaults: one forward of both columns, padded to the longest text. `twice` is
LLM2Vec's loop: a padded forward a column, mean, softmax. All get the same texts, weights, seeds,
loss and optimizer, and none caches. Claims, at batch 64 and one thread: ours >= 1.5 times as fast
as either; on pairs, without dropout, the losses agree within 1e-3 at every step; and a cached step
of batch 512 takes <= 1.3 times the memory of the process that one of batch 64 takes (what the
steps alone take is shown beside it, without a claim).
"""

import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from benchmarks.common import medians, peak_of_child, write
from ubmoe.bidirectional import make_bidirectional
from ubmoe.config import BiSection, StageSection
from ubmoe.encoder.contrastive import CachedContrastiveLoss, ContrastiveLoss, attention_dropout
from ubmoe.encoder.contrastive_loss import mini_batch
from ubmoe.encoder.sentence_encoder import as_encoder
from ubmoe.recording import peak_memory_bytes
from ubmoe.tiny.model import train_tokenizer
from ubmoe.training.modules import train_only

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, HEADS = (24, 14) if DEVICE.type == "cuda" else (2, 7)
REPEATS, STEPS = 5, 6  # timed steps; steps whose losses are compared
SEED = 42
MEAN, SPREAD = 27, 0.5  # tokens of a sentence; the standard deviation of their logarithm
STAGE = StageSection(train=["ffn"], loss="simcse", learning_rate=1e-4)  # the rest: the defaults
BATCH, LARGE = STAGE.per_device_train_batch_size, 512
FASTER, CLOSE, LARGER = 1.5, 1e-3, 1.3  # the claimed limits
TOKENS = mini_batch(STAGE.mini_batch_tokens, DEVICE)
MEGABYTE = 1e6
SETTINGS = {
    **STAGE.model_dump(include={"loss", "train", "temperature", "dropout"}),
    **{
        "batch": BATCH,
        "mini_batch_tokens": TOKENS,
        "max_tokens": STAGE.max_tokens,
        "mean_tokens": MEAN,
        "spread": SPREAD,
    },
    **{"layers": LAYERS, "heads": HEADS, "seed": SEED, "threads": 1},
    **{"timed_steps": REPEATS, "compared_steps": STEPS},
}

Batch = list[list[str]]  # a column of texts for the anchors, and one for the positives
Loss = Callable[[list[dict[str, Any]], Any], Tensor]
Row = dict[str, object]


# --- texts and model ------------------------------------------------------------------------------


@cache
def tokenizer() -> Qwen2Tokenizer:
    return train_tokenizer()


def batches(rows: int, pairs: bool = False) -> Iterator[Batch]:
    """Random sentences, the same ones each time: with themselves or, as pairs, half their words."""
    words = [f" {token[1:]}" for token in sorted(tokenizer().get_vocab()) if token[0] == "Ġ"]
    words = [word for word in words if word[1:].isalpha()]  # a token each
    weights = [1 / rank for rank in range(1, len(words) + 1)]  # Zipf's: texts share words
    draw = random.Random(SEED)
    while True:
        lengths = [draw.lognormvariate(math.log(MEAN) - SPREAD**2 / 2, SPREAD) for _ in range(rows)]
        anchors = [draw.choices(words, weights, k=max(2, round(length))) for length in lengths]
        halves = [draw.sample(anchor, len(anchor) // 2) for anchor in anchors]
        columns = (anchors, halves if pairs else anchors)
        yield [["".join(text) for text in column] for column in columns]


def build() -> tuple[SentenceTransformer, PreTrainedModel]:
    """The encoder and its model, with the same weights every time."""
    torch.manual_seed(SEED)
    config = Qwen2Config(
        hidden_size=64 * HEADS,
        intermediate_size=4864 * HEADS // 14,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 7,
        vocab_size=1024,  # the embedding takes no part in the claims
    )
    model: Any = Qwen2ForCausalLM(config)
    make_bidirectional(model.to(DEVICE).eval())
    train_only(model, STAGE.train)
    form = BiSection(prompt=None, max_tokens=STAGE.max_tokens)
    return as_encoder(model, tokenizer(), form).train(), model


# --- ways to train --------------------------------------------------------------------------------


def ours(encoder: SentenceTransformer) -> Loss:
    return ContrastiveLoss(encoder, STAGE.loss, STAGE.temperature, TOKENS)


def cached(encoder: SentenceTransformer) -> Loss:
    return CachedContrastiveLoss(encoder, STAGE.loss, STAGE.temperature, TOKENS)


def merged(encoder: SentenceTransformer) -> Loss:
    return MultipleNegativesRankingLoss(encoder, scale=1 / STAGE.temperature)


def twice(encoder: SentenceTransformer) -> Loss:
    transformer: Any = encoder[0]

    def mean(features: dict[str, Tensor]) -> Tensor:
        ids, mask = features["input_ids"], features["attention_mask"]
        states = transformer.model(ids, mask, use_cache=False).last_hidden_state
        return (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    def loss(columns: list[dict[str, Any]], _: Any) -> Tensor:
        anchors, positives = [normalize(mean(features), dim=-1) for features in columns]
        cosines = anchors @ positives.T
        return cross_entropy(cosines / STAGE.temperature, torch.arange(len(cosines), device=DEVICE))

    return loss


THEIRS: dict[str, Callable[[SentenceTransformer], Loss]] = {"merged": merged, "twice": twice}
WAYS = {"ours": ours} | THEIRS


class Training:
    """One way to train a model of its own; `exact` is in float32 and without dropout."""

    def __init__(
        self,
        way: Callable[[SentenceTransformer], Loss],
        texts: Iterator[Batch],
        exact: bool = False,
    ) -> None:
        self.encoder, self.model = build()
        self.loss, self.texts = way(self.encoder), texts
        self.dropout = 0.0 if exact else STAGE.dropout
        self.bf16 = DEVICE.type == "cuda" and not exact
        trainable = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, STAGE.learning_rate, weight_decay=0.0)
        self.losses: list[float] = []

    def step(self) -> None:
        torch.manual_seed(SEED + len(self.losses))
        columns = [self.features(column) for column in next(self.texts)]
        autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16)
        with attention_dropout(self.model, self.dropout), autocast:
            loss = self.loss(columns, None)
            loss.backward()  # a cached loss runs the model again here
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def features(self, texts: list[str]) -> dict[str, Any]:
        encoded = self.encoder.preprocess(texts)
        return {
            key: value.to(DEVICE) if isinstance(value, Tensor) else value
            for key, value in encoded.items()
        }


# --- claims ---------------------------------------------------------------------------------------


def row(claim: str, both: tuple[object, object], value: object, limit: str, holds: bool) -> Row:
    """A line of the table; `both` are the numbers compared, as the claim names them."""
    numbers = {"first": both[0], "second": both[1], "value": value}
    return {"claim": claim, **numbers, "limit": limit, "holds": "yes" if holds else "no"}


def speed(runs: dict[str, Training]) -> list[Row]:
    """Sentences (not views) a second, and how many times as many."""
    seconds = medians({name: run.step for name, run in runs.items()}, REPEATS)
    rates = {name: BATCH / taken for name, taken in seconds.items()}
    return [
        row(
            f"sentences/s, ours / {other}",
            (rates["ours"], rates[other]),
            rates["ours"] / rates[other],
            f">= {FASTER}",
            rates["ours"] >= FASTER * rates[other],
        )
        for other in THEIRS
    ]


def agreement(runs: dict[str, Training]) -> list[Row]:
    """The last losses, and the largest relative difference of any step."""
    for _ in range(STEPS):
        for run in runs.values():
            run.step()
    rows = []
    for other in THEIRS:
        a, b = runs["ours"].losses, runs[other].losses
        worst = max(abs(x - y) / y for x, y in zip(a, b, strict=True))
        shown = f"{a[-1]:.4f}", f"{b[-1]:.4f}"
        limit = f"<= {CLOSE:.0e}"
        rows.append(row(f"loss, ours - {other}", shown, f"{worst:.0e}", limit, worst <= CLOSE))
    return rows


def memory() -> list[Row]:
    """Megabytes of a cached step: of the whole process, and above what it holds without it."""
    held, small, large = (
        peak_of_child("benchmarks.contrastive", rows) / MEGABYTE for rows in (0, BATCH, LARGE)
    )
    ratio, what = large / small, f"cached, batch {LARGE} / {BATCH}"
    whole = row(f"MB, {what}", (large, small), ratio, f"<= {LARGER}", ratio <= LARGER)
    steps = large - held, small - held
    alone = row(f"step's MB, {what}", steps, steps[0] / steps[1], "none", True)
    return [whole, alone | {"holds": "no claim"}]


def peak(rows: int) -> int:
    """Most memory of this process in a cached step of so many rows; 0: of all but the step."""
    run = Training(cached, batches(2))
    run.step()  # from here on the process holds the optimizer's state
    if rows:
        run.texts = batches(rows)
        run.step()
    return peak_memory_bytes()


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:  # a child: one step, for its peak memory
        print(peak(int(sys.argv[1])))
        return
    rough = {name: Training(way, batches(BATCH)) for name, way in WAYS.items()}
    exact = {name: Training(way, batches(BATCH, pairs=True), True) for name, way in WAYS.items()}
    rows = [*speed(rough), *agreement(exact), *memory()]
    losses = {
        name: {"with_dropout": rough[name].losses, "exact": exact[name].losses} for name in WAYS
    }
    means = {name: statistics.mean(run.losses) for name, run in rough.items()}
    print("mean losses with dropout:", ", ".join(f"{name} {x:.1e}" for name, x in means.items()))
    write("contrastive", rows, settings=SETTINGS, losses=losses, mean_losses_with_dropout=means)


if __name__ == "__main__":
    main()
