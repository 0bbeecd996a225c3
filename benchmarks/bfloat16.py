"""Gain and cost of bfloat16 autocast on SmolLM2-135M's shape, weights in float32.

python -m benchmarks.bfloat16                                random weights: speed
python -m benchmarks.bfloat16 MODEL PAIRS.tsv CHATS.jsonl    and what it changes of a real model

Claims, where the processor has bfloat16: a SimCSE step at least 5 times faster than in float32,
scoring at least 3 times; STS within 0.5, DP within 0.1 points.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import medians, write
from ubmoe.bidirectional import set_attention
from ubmoe.config import BiSection, DependenceSection, ModelSection
from ubmoe.data.rows import read_texts
from ubmoe.dependence.measure import measure
from ubmoe.dependence.texts import cut, tokenize
from ubmoe.encoder.sentence_encoder import as_encoder
from ubmoe.evaluate.sts import sts_scores, sts_task
from ubmoe.models.loading import best_device, load_model
from ubmoe.models.precision import autocast, has_bfloat16
from ubmoe.models.source import ModelSource

DEVICE = best_device()
SENTENCES, TOKENS = 64, 48  # the configuration's batch, at its longest
CHATS = 20
REPEATS = 3


def smollm2() -> Any:
    """SmolLM2-135M's shape with random weights."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    return set_attention(model.to(DEVICE), bidirectional=True)


def vectors(model: Any, ids: Tensor, bf16: bool) -> Tensor:
    with autocast(bf16, DEVICE):
        return model.model(input_ids=ids, use_cache=False).last_hidden_state.mean(1)


def step(model: Any, ids: Tensor, bf16: bool) -> None:
    """Two views of every sentence, the FFNs training."""
    a, b = vectors(model, ids.repeat(2, 1), bf16).float().chunk(2)
    scores = nn.functional.normalize(a, dim=-1) @ nn.functional.normalize(b, dim=-1).T
    nn.functional.cross_entropy(scores / 0.05, torch.arange(len(ids), device=DEVICE)).backward()
    model.zero_grad()


def speed() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = smollm2().train()
    for name, value in model.named_parameters():
        value.requires_grad = ".mlp." in name
    ids = torch.randint(1024, (SENTENCES, TOKENS), device=DEVICE)
    rows = []
    for claim, limit, run in (
        ("a SimCSE step, float32 / bfloat16", 5.0, step),
        ("scoring, float32 / bfloat16", 3.0, torch.no_grad()(vectors)),
    ):
        ways: dict[str, Any] = {}
        for bf16 in (False, True):
            ways[str(bf16)] = partial(run, model, ids, bf16)
        seconds = medians(ways, REPEATS)
        ratio = seconds["False"] / seconds["True"]
        holds = "yes" if ratio >= limit else "no"
        rows.append({"claim": claim, "value": ratio, "limit": f">= {limit:g}", "holds": holds})
    return rows


def changes(name: str, pairs: str, chats: str) -> list[dict[str, Any]]:
    """STS of a real model under the causal mask, and DP-after of some chats."""
    settings = ModelSection(name=name)
    tokenizer, model = ModelSource.of(settings).tokenizer, load_model(settings)
    encoder = as_encoder(model, tokenizer, BiSection(prompt=None, attention="causal"))
    texts = tokenize(tokenizer, read_texts(chats, CHATS))
    texts, _ = cut(model, texts, 1024)
    sts, after = [], []
    for bf16 in (False, True):
        sts.append(sts_scores(encoder, [sts_task(pairs)], 64, bf16)["average"])
        with tempfile.TemporaryDirectory() as folder:
            section = measure(model, texts, DependenceSection(bf16=bf16), Path(folder))
        after.append(section["overall"]["after"])
    rows = []
    for claim, (exact, rounded), most in (
        (f"STS of {Path(name).name}, bfloat16 - float32", sts, 0.5),
        ("its DP-after, bfloat16 - float32", after, 0.1),
    ):
        holds = "yes" if abs(rounded - exact) <= most else "no"
        limit = f"+-{most:g}"
        rows.append({"claim": claim, "value": rounded - exact, "limit": limit, "holds": holds})
    return rows


def main() -> None:
    rows = speed()
    if len(sys.argv) > 1:
        rows += changes(*sys.argv[1:])
    write("bfloat16", rows, in_hardware=has_bfloat16(DEVICE))


if __name__ == "__main__":
    main()
