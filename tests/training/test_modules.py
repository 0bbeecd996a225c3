"""What trains is float32, whatever the rest is kept in, and the numbers are autocast's."""

import pytest
import torch
from builders import random_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from ubmoe import owned
from ubmoe.config import BiSection, LoraSection, StageSection
from ubmoe.encoder import contrastive
from ubmoe.encoder.sentence_encoder import as_encoder
from ubmoe.models.precision import cast
from ubmoe.training.checkpoints import StageRun

STEPS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "dropout": 0.2}


@pytest.fixture
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


def tuned(tokenizer, tmp_path, dtype, train, seen=None, **keys):
    """(log, model) of a model of bfloat16's numbers, kept in a dtype, and trained."""
    torch.manual_seed(0)
    model = cast(random_model("qwen2", vocab_size=len(tokenizer)), torch.bfloat16)
    model = cast(model, dtype)
    model.config.is_causal = False
    encoder = as_encoder(model, tokenizer, BiSection(prompt=None))
    handle = model.base_model.norm.register_forward_hook(lambda *_: seen and seen(model))
    stage = StageSection(**STEPS | keys, train=train, dataset="tiny", max_rows=40, loss="simcse")
    data, _ = contrastive.read_dataset(stage, tokenizer)
    report = contrastive.train_stage(encoder, model, stage, data, StageRun(tmp_path, 0))
    handle.remove()
    return report["log"], model


@pytest.mark.parametrize("train", ["ffn", "attention", "embedding", "all"])
def test_frozen_weights_in_bfloat16_change_no_number_under_autocast(tokenizer, tmp_path, train):
    """Against everything in float32: the same losses, and the same weights once rounded."""
    kept = {}

    def seen(model):
        kept.update({name: value.dtype for name, value in model.named_parameters()})

    train = [train]
    log, model = tuned(tokenizer, tmp_path / "a", torch.bfloat16, train, seen, bf16=True)
    expected, reference = tuned(tokenizer, tmp_path / "b", torch.float32, train, bf16=True)
    for actual, wanted in zip(log, expected, strict=True):
        assert actual.get("loss") == wanted.get("loss")
        assert actual.get("grad_norm") == wanted.get("grad_norm")
    untrained = cast(random_model("qwen2", vocab_size=len(tokenizer)), torch.bfloat16)
    moved = []
    for (name, value), other, before in zip(
        model.named_parameters(), reference.parameters(), untrained.parameters(), strict=True
    ):
        assert value.dtype == torch.bfloat16 and other.dtype == torch.float32
        assert torch.equal(value, other.bfloat16()), name
        changed = not torch.equal(value, before)
        moved.append(changed)
        assert kept[name] == (torch.float32 if changed else torch.bfloat16), name
    assert any(moved) and not (all(moved) and train != ["all"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_autocast_everything_is_float32_while_it_trains(tokenizer, tmp_path, dtype):
    log, model = tuned(tokenizer, tmp_path / "a", dtype, ["ffn"], bf16=False)
    expected, reference = tuned(tokenizer, tmp_path / "b", torch.float32, ["ffn"], bf16=False)
    assert log[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.02)
    for value, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.float(), other, atol=2e-2, rtol=2e-2)


def test_adapters_are_added_in_float32_and_then_cast(tokenizer, tmp_path):
    """Against W + scale B A in float64, from the saved adapter."""
    keys = {"lora": LoraSection(rank=4, dropout=0.0), "bf16": True}
    _, model = tuned(tokenizer, tmp_path, torch.bfloat16, ["ffn"], **keys)
    assert not list(owned.strangers(tmp_path))  # so that the same run may begin anew
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = cast(random_model("qwen2", vocab_size=len(tokenizer)), torch.bfloat16)
    scale = 16.0 / 4**0.5  # alpha / sqrt(rank): rslora
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    moved = 0
    for name, value in base.state_dict().items():
        layer = name.removesuffix(".weight")
        key = f"base_model.model.{layer}.lora_%s.weight"
        if layer not in layers or key % "A" not in saved:
            continue
        product = saved[key % "B"].double() @ saved[key % "A"].double()
        wanted = (value.double() + scale * product).bfloat16()
        difference = (layers[layer].weight != wanted).float().mean()
        assert difference < 1e-3, layer  # rounding of the last bit of float32
        assert layers[layer].weight.dtype == torch.bfloat16
        moved += not torch.equal(wanted, value)
    assert moved == 6
