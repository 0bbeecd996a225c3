"""The guard that ends a run before a step that is not finite; nothing of training stays."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import random_model
from transformers import AutoTokenizer

from ubmoe.config import BiSection, StageSection, UserError
from ubmoe.encoder import contrastive
from ubmoe.encoder.sentence_encoder import as_encoder
from ubmoe.training.checkpoints import StageRun
from ubmoe.training.trainer import StopOnBadLoss


def look(loss: float, gradient: float) -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.full((1, 2), gradient)
    guard = StopOnBadLoss()
    guard.loss = guard.loss + torch.tensor(loss)
    guard.on_pre_optimizer_step(None, SimpleNamespace(global_step=6), None, model=model)
    assert guard.loss == 0.0


def test_a_finite_step_is_taken():
    look(3.0, -2.0)


@pytest.mark.parametrize("loss", [float("inf"), float("nan")])
@pytest.mark.parametrize("gradient", [1.0, float("nan")])
def test_a_bad_loss_is_reported_whatever_its_gradient(loss, gradient):
    with pytest.raises(UserError, match=f"step 7: the loss is {loss}; lower learning_rate"):
        look(loss, gradient)


def test_a_bad_gradient_is_named():
    with pytest.raises(UserError, match="step 7: the gradient of weight is not finite"):
        look(1.0, float("nan"))


def test_autocast_ends_with_training(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    model = random_model("qwen2", vocab_size=len(tokenizer))
    form = BiSection(prompt=None)
    encoder = as_encoder(model, tokenizer, form)
    keys = {"max_steps": 2, "per_device_train_batch_size": 4, "max_rows": 40, "bf16": True}
    stage = StageSection(**keys, train=["ffn"], dataset="tiny")
    data, _ = contrastive.read_dataset(stage, tokenizer)
    contrastive.train_stage(encoder, model, stage, data, StageRun(tmp_path, 0))
    same = as_encoder(copy.deepcopy(model), tokenizer, form)
    assert np.array_equal(encoder.encode(["The cat sleeps."]), same.encode(["The cat sleeps."]))
