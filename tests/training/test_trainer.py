"""The guard that ends a run before a step that is not finite."""

from types import SimpleNamespace

import pytest
import torch

from ubmoe.config import UserError
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
def test_a_bad_loss_is_told_whatever_its_gradient(loss, gradient):
    with pytest.raises(UserError, match=f"step 7: the loss is {loss}; lower learning_rate"):
        look(loss, gradient)


def test_a_bad_gradient_is_named():
    with pytest.raises(UserError, match="step 7: the gradient of weight is not finite"):
        look(1.0, float("nan"))
