"""The shifted attention, against the library's own with a biased mask, and against DP's own."""

import pytest
import torch
from builders import random_model

from ubmoe.config import UserError
from ubmoe.dependence import COLUMNS
from ubmoe.dependence.recorder import dependence_of, observed
from ubmoe.interventions.shift import shifting
from ubmoe.interventions.shifted import REACH, SEEN, shifts_to

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
DP = ("first", "after", "without_first.after")


def logits(model, ids=IDS, mask=MASK):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def biased(model, shift):
    """With the library's own attention, which takes such a mask as it is."""
    bias = torch.full((6, 6), float("-inf")).triu(1).repeat(len(shift), 1, 1)
    bias[..., 0] += shift[:, None]
    return logits(model, IDS[:1], bias[None])


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma", "qwen3", "mistral"])
def test_without_a_shift_it_is_the_models_own(family):
    model = random_model(family)
    own, implementation = logits(model), model.config._attn_implementation
    with shifting(model):
        actual = logits(model)
        alone = logits(model, IDS[1:, :3], None)
        left = logits(model, IDS[1:].roll(3, 1), MASK[1:].roll(3, 1))
    assert torch.allclose(actual[MASK.bool()], own[MASK.bool()], atol=1e-4)
    assert torch.allclose(alone[0], own[1, :3], atol=1e-4)
    before = logits(model, IDS[1:].roll(3, 1), MASK[1:].roll(3, 1))
    assert torch.allclose(left[0, 3:], before[0, 3:], atol=1e-4)
    assert torch.equal(logits(model), own) and model.config._attn_implementation == implementation


def test_a_shift_is_a_bias_on_the_first_key():
    model = random_model("qwen2")
    shift = torch.linspace(-2, 3, model.config.num_attention_heads)
    expected = biased(model, shift)
    assert not torch.allclose(expected, logits(model, IDS[:1], MASK[:1]), atol=0.1)
    with shifting(model) as shifts:
        shifts.by_layer = {layer: shift for layer in range(model.config.num_hidden_layers)}
        actual = logits(model, IDS[:1], MASK[:1])
    assert torch.allclose(actual, expected, atol=1e-4)


def test_what_it_sees_is_what_dp_counts_and_what_eager_attention_uses():
    model = random_model("qwen2")
    with observed(model) as recorder:
        places = [COLUMNS.index(item) for item in DP]
        expected = dependence_of(model, recorder, IDS, MASK)[..., places]
    with shifting(model) as shifts:
        shifts.seen.clear()
        shifts.rows = []
        logits(model)
        actual, rows = torch.stack(shifts.seen, 1).double(), shifts.rows
    assert torch.allclose(actual[..., 1:], expected, atol=1e-5) and len(SEEN) == 4
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(input_ids=IDS[:1], output_attentions=True).attentions  # (1, H, 6, 6) each
    used = torch.stack([item[0, :, :, 0] for item in eager])
    assert torch.allclose(actual[0, ..., 0].float(), used.mean(-1), atol=1e-5)
    assert torch.allclose(torch.stack(rows)[..., :6], used, atol=1e-5)
    assert rows[0].shape[1] == 9  # of the second text the real ones alone


def test_shares_stay_float32_under_autocast():
    model = random_model("qwen2")
    with shifting(model) as shifts:
        shifts.seen.clear()
        shifts.wanted = torch.full((2, model.config.num_attention_heads), 0.4)
        with torch.autocast("cpu", torch.bfloat16):
            logits(model)
    assert {item.dtype for item in shifts.seen} == {torch.float32}
    means = torch.stack(shifts.seen, 1).mean(0)[..., 0]
    assert torch.allclose(means, shifts.wanted, atol=1e-5)


def test_a_shift_gives_the_share_that_is_wanted():
    odds = torch.tensor([[0.3], [-2.0]])  # of one row the shift is the difference of logits
    wanted = torch.tensor([0.9, 0.05])
    assert torch.allclose(shifts_to([odds], wanted), wanted.logit() - odds[:, 0], atol=1e-4)
    several = [torch.randn(2, 5), torch.randn(2, 3)]
    shift = shifts_to(several, wanted)
    shares = [(item + shift[:, None]).sigmoid().mean(1) for item in several]  # texts count alike
    assert torch.allclose(sum(shares) / 2, wanted, atol=1e-5)
    none, all_ = shifts_to([odds], torch.tensor([0.0, 1.0])).tolist()
    assert none == pytest.approx(-REACH) and all_ > 15  # from where a share is 1 in float32


FULL = {"layer_types": ["full_attention"] * 2}


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma3_text", {"sliding_window": 4}, "sliding_window"),
        ("gemma2", FULL, "softcap"),
        ("gpt_oss", FULL, "s_aux"),
    ],
)
def test_attention_that_is_more_than_a_softmax_is_refused(family, changes, said):
    model = random_model(family, **changes)
    own = model.config._attn_implementation
    with pytest.raises(UserError, match=f"attends with .*{said}.*expected"), shifting(model):
        logits(model)
    assert model.config._attn_implementation == own


def test_a_window_that_hides_nothing_is_no_matter():
    model = random_model("mistral", sliding_window=4096)
    with shifting(model):
        logits(model)


def test_a_model_of_which_some_layers_do_not_attend_is_refused():
    model = random_model("qwen2")
    model.config.layer_types = ["full_attention", "conv"]
    with pytest.raises(UserError, match="expected attention in every layer"), shifting(model):
        pass
