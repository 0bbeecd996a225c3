"""How much of a processor's matrix peak a SimCSE step reaches on real models.

python -m benchmarks.peak configs/smollm2-135m.yaml MODEL.gguf [configs/... MODEL.gguf ...]

The share is the step's matrix FLOPs (torch's own counter: forward, backward and the two views) over
its seconds, over the rate of one product of the shape of the model's FFN on as many tokens, in the
same numbers, taken in turn with the steps. Sentences are the embedded language's, after the prompt
of the form EOL. `mini_batch` is the size in padded tokens that the batch is cut into.
Claim: the share is at least .6.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.util import batch_to_device
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import medians, write
from ubmoe.config import load_config
from ubmoe.data.tokens import sentences_of
from ubmoe.encoder.contrastive import attention_dropout
from ubmoe.encoder.contrastive_loss import ContrastiveLoss
from ubmoe.encoder.sentence_encoder import as_encoder
from ubmoe.models.loading import load_model
from ubmoe.models.precision import autocast, uses_bfloat16
from ubmoe.models.source import ModelSource
from ubmoe.training.modules import train_only

SENTENCES, REPEATS, LEAST = 64, 3, 0.6
MINI_BATCHES = (1024, 4096)  # padded tokens
DROPOUTS = (0.3, 0.0)  # with dropout, attention takes torch's slower way on a processor


def product(
    tokens: int, shape: torch.Size, device: torch.device, bf16: bool
) -> tuple[Callable[[], object], int]:
    """One product of an FFN's shape on so many tokens, and its FLOPs."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    states = torch.randn(tokens, shape[1], device=device, dtype=dtype)
    weight = torch.randn(shape, device=device, dtype=dtype)
    return partial(torch.nn.functional.linear, states, weight), 2 * tokens * shape.numel()


def rows(path: str, name: str) -> list[dict[str, Any]]:
    keys = [f"model.name={name}", "bi.form=eol", "bi.attention=causal"]
    config = load_config(path, keys)
    source = ModelSource.of(config.model)
    config = source.within_context(config, "bi")
    tokenizer, model = source.tokenizer, load_model(source, *config.bi.mask)
    encoder = as_encoder(model, tokenizer, config.bi)
    train_only(model, ["ffn"])
    model.train()
    device, bf16 = model.device, uses_bfloat16("auto", model.device)
    sentences = sentences_of("tiny", tokenizer, SENTENCES)
    inner: Any = model.base_model
    ffn = inner.layers[0].mlp.up_proj.weight

    def step(loss: ContrastiveLoss, dropout: float) -> None:
        columns = [encoder.preprocess(sentences) for _ in range(2)]
        moved = [batch_to_device(column, device) for column in columns]
        with attention_dropout(model, dropout):
            with autocast(bf16, device):
                value = loss(moved)
            value.backward()
        model.zero_grad()

    rows = []
    tokens = int(encoder.preprocess(sentences)["attention_mask"].sum()) * 2
    for mini_batch in MINI_BATCHES:
        for dropout in DROPOUTS:
            loss = ContrastiveLoss(encoder, "simcse", 0.05, mini_batch)
            with FlopCounterMode(display=False) as counter:
                step(loss, dropout)
            matrix, flops = product(mini_batch, ffn.shape, device, bf16)
            seconds = medians(
                {"step": partial(step, loss, dropout), "product": partial(_many, matrix)}, REPEATS
            )
            rate = flops * MANY / seconds["product"]
            share = counter.get_total_flops() / seconds["step"] / rate
            rows.append(
                {
                    **{"model": Path(path).stem, "mini_batch": mini_batch, "dropout": dropout},
                    **{"tokens": tokens, "step_s": seconds["step"], "peak_GFLOP/s": rate / 1e9},
                    **{"share": share, "limit": f">= {LEAST}"},
                    "holds": "yes" if share >= LEAST else "no",
                }
            )
    return rows


MANY = 50  # products that are timed together


def _many(matrix: Callable[[], object]) -> None:
    for _ in range(MANY):
        matrix()


def main() -> None:
    given = sys.argv[1:]
    pairs = zip(given[::2], given[1::2], strict=True)
    write("peak", [row for path, name in pairs for row in rows(path, name)])


if __name__ == "__main__":
    main()
