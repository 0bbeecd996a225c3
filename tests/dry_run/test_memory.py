"""Shapes keep what tensors keep, by paper and pencil, by real models, and by peft's adapters."""

import pytest
import torch
from builders import random_model
from torch import nn
from transformers import AutoModelForCausalLM

from ubmoe.config import LoraSection, StageSection
from ubmoe.dry_run import batches, memory
from ubmoe.dry_run.memory import Batch, kept_for_backward, shapes
from ubmoe.models import lora
from ubmoe.models.precision import cast
from ubmoe.training.modules import named_by, train_only


class Toy(nn.Module):
    """A layer of 3 x 5 and one of 5 x 2 on (B, T) tokens of 3 numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False)
        self.base_model = self

    def forward(self, input_ids, use_cache):
        states = input_ids[..., None].expand(*input_ids.shape, 3).float()
        return type("O", (), {"last_hidden_state": self.second(self.first(states).relu())})


def test_what_is_kept_is_what_paper_and_pencil_say():
    """Inputs of both layers (the first one's is a parameterless constant), relu's output shared."""
    batch = Batch(4, 6)
    assert kept_for_backward(Toy(), [batch]) == 4 * (4 * 6 * 3 + 4 * 6 * 5)
    assert kept_for_backward(Toy(), [batch] * 3) == 3 * 4 * (4 * 6 * 3 + 4 * 6 * 5)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_shapes_keep_as_many_bytes_as_tensors_do(family):
    batch = [Batch(3, 7, predicted=5)]
    real = random_model(family).train()
    expected = kept_for_backward(real, batch)
    with shapes():
        shaped = AutoModelForCausalLM.from_config(real.config, dtype=torch.float32).train()
        kept = kept_for_backward(shaped, batch)
        # the mask, which a real pass leaves away where sdpa knows it
        assert expected <= kept == pytest.approx(expected, rel=0.1)
        assert memory.size(shaped) == memory.size(real)
        fewer = kept_for_backward(shaped, batch, checkpointing=True)
    assert fewer < expected


@pytest.mark.parametrize("train", [["ffn"], ["ffn@3-4"]])
def test_layers_that_are_not_run_are_counted(train):
    model = random_model("qwen2", num_hidden_layers=5).train()
    train_only(model, train)
    layers, counted = model.base_model.layers, kept_for_backward(model, [Batch(3, 7, 5)])
    assert model.base_model.layers is layers
    assert counted == memory._kept(model, [Batch(3, 7, 5)], False, False)


def test_adapters_of_shapes_are_as_large_as_pefts_and_keep_as_much():
    names = named_by(random_model("qwen2"), "ffn")
    real, shaped = random_model("qwen2").train(), random_model("qwen2").train()
    wrapped = lora.attach(real, names, LoraSection(rank=4, dropout=0.1))
    numbers = sum(value.numel() for value in wrapped.parameters() if value.requires_grad)
    assert memory.adapt(shaped, names, 4, 0.1) == numbers
    batch = [Batch(3, 7)]
    expected = kept_for_backward(real, batch)
    assert kept_for_backward(shaped, batch) == pytest.approx(expected, rel=0.05)


def parts(model, optim="adamw_torch_fused", bf16=True, shards=1, **keys):
    stage = StageSection(optim=optim, **keys)
    return memory.of_training(model, stage, [Batch(2, 5)], 0.0, bf16, shards)


def test_only_what_trains_is_float32_and_has_gradients_and_moments():
    """2 layers of 3 x 32 x 48 train; the rest is in bfloat16, whose numbers are 2 bytes."""
    model = cast(random_model("qwen2"), torch.bfloat16)
    whole = sum(value.numel() for value in model.parameters())
    train_only(model, ["ffn"])
    numbers = 2 * 3 * 32 * 48
    actual = parts(model)
    assert actual["weights"] == 2 * (whole - numbers) + 4 * numbers
    assert actual["gradients"] == 4 * numbers and actual["optimiser"] == 8 * numbers
    assert actual["weights as they are used"] == 2 * numbers
    for optim, bytes_each in (("adamw_8bit", 2), ("adafactor", 0), ("adamw_torch", 12)):
        assert parts(model, optim)["optimiser"] == bytes_each * numbers
    sharded = parts(model, shards=4)
    assert sharded["weights"] == 2 * (whole - numbers) + numbers
    assert sharded["gradients"] == numbers and sharded["optimiser"] == 2 * numbers
    assert sharded["weights as they are used"] == 2 * 2 * numbers // 2
    plain = parts(model, bf16=False)
    assert plain["weights"] == 4 * whole and "weights as they are used" not in plain


def test_a_step_is_the_largest_that_is_drawn_and_its_mini_batches_are_the_runs_own():
    """Rows of 1 to 9 tokens, two columns: three of the longest are drawn sooner or later."""
    section = StageSection(per_device_train_batch_size=3, max_steps=1000)
    sizes = list(range(1, 10))

    def forwards(rows):
        return [Batch(1, sizes[row]) for row in rows]

    actual = batches.largest(9, section, forwards)
    assert len(actual) == 3
    assert sum(item.padded for item in actual) == max(
        sum(forward.padded for forward in forwards(rows)) for rows in batches._drawn(9, section)
    )
    assert len(list(batches._drawn(9, section))) == batches.DRAWN
    assert len(list(batches._drawn(9, section.model_copy(update={"max_steps": 2})))) == 2


def test_a_cached_step_holds_its_largest_mini_batch():
    class Tokens:
        def __call__(self, texts, truncation, max_length):
            return {"input_ids": [[0] * min(len(text), max_length) for text in texts]}

    from datasets import Dataset

    texts = ["a" * size for size in (2, 3, 8, 9)]
    data = Dataset.from_dict({"anchor": texts, "positive": texts})
    keys = {"per_device_train_batch_size": 4, "mini_batch_tokens": 20, "max_tokens": 8}
    whole = batches.of_stage(StageSection(**keys), data, Tokens(), None)
    assert sum(item.texts for item in whole) == 8
    assert all(item.padded <= 20 for item in whole) and max(item.tokens for item in whole) == 8
    cached = batches.of_stage(StageSection(**keys, cached=True), data, Tokens(), None)
    assert cached == [max(whole, key=lambda item: item.padded)]
