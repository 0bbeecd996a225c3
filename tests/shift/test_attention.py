"""The shifted attention, against the library's own with a biased mask, and against DP's own."""

import pytest
import torch
from builders import random_model

from ubmoe.config import UserError
from ubmoe.dependence.recorder import dependence_of, observed
from ubmoe.shift.attention import REACH, shifts_to
from ubmoe.shift.shifts import shifting

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def logits(model, ids=IDS, mask=MASK):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma"])
def test_without_a_shift_it_is_the_models_own(family):
    model = random_model(family)
    own = logits(model)
    with shifting(model):
        found = logits(model)
    assert torch.allclose(found[MASK.bool()], own[MASK.bool()], atol=1e-4)
    assert torch.equal(logits(model), own)  # as before


def test_a_shift_is_a_bias_on_the_first_key():
    model = random_model("qwen2")
    shift = torch.linspace(-2, 3, model.config.num_attention_heads)
    bias = torch.full((6, 6), float("-inf")).triu(1).repeat(len(shift), 1, 1)
    bias[..., 0] += shift[:, None]
    expected = logits(model, IDS[:1], bias[None])  # the library takes such a mask as it is
    assert not torch.allclose(expected, logits(model, IDS[:1], MASK[:1]), atol=0.1)
    with shifting(model) as shifts:
        shifts.by_layer = {layer: shift for layer in range(model.config.num_hidden_layers)}
        found = logits(model, IDS[:1], MASK[:1])
    assert torch.allclose(found, expected, atol=1e-4)


def test_what_it_sees_is_what_dp_counts():
    model = random_model("qwen2")
    with observed(model) as recorder:
        expected = dependence_of(model, recorder, IDS, MASK)[..., [3, 2]]  # first, after
    with shifting(model) as shifts:
        shifts.seen.clear()
        logits(model)
        found = torch.stack(shifts.seen, 1)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_a_shift_gives_the_share_that_is_wanted():
    odds = torch.tensor([[0.3], [-2.0]])  # of one row the shift is the difference of logits
    wanted = torch.tensor([0.9, 0.05])
    assert torch.allclose(shifts_to([odds], wanted), wanted.logit() - odds[:, 0], atol=1e-4)
    several = [torch.randn(2, 5), torch.randn(2, 3)]
    shift = shifts_to(several, wanted)
    shares = [(each + shift[:, None]).sigmoid().mean(1) for each in several]  # texts count alike
    assert torch.allclose(sum(shares) / 2, wanted, atol=1e-5)
    assert shifts_to([odds], torch.tensor([0.0, 1.0])).abs() == pytest.approx(REACH, abs=20)


def test_attention_that_is_more_than_a_softmax_is_refused():
    model = random_model("gemma2")
    with pytest.raises(UserError, match="Gemma2ForCausalLM|softcap|window"), shifting(model):
        logits(model)
