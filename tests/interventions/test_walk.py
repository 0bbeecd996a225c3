"""All patterns in one walk, against a model of each pattern alone."""

import copy

import pytest
import torch
from builders import random_model

from ubmoe.bidirectional import is_bidirectional, set_attention, set_layers
from ubmoe.config import ScanSection, UserError
from ubmoe.interventions.patterns import patterns
from ubmoe.interventions.walk import final_norm, layers_of, states, without_first

DEPTH = 4
KINDS = ScanSection(patterns=["from", "to", "only", "every"])
EVERY = patterns(KINDS, DEPTH, keep_sink=False)
KEPT = patterns(KINDS, DEPTH, keep_sink=True)
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15]]
INPUTS = {
    "input_ids": torch.tensor([ROWS[0], [*ROWS[1], 0, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]]),
}


@pytest.mark.parametrize("keep_sink", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3", "gemma3_text", "phi"])
def test_each_pattern_is_what_a_model_of_it_gives(family, keep_sink):
    keys = {"sliding_window": 3} if family in ("mistral", "gemma3_text") else {}
    model = random_model(family, num_hidden_layers=DEPTH, **keys).eval()
    asked = KEPT if keep_sink else EVERY
    actual = dict(states(model, INPUTS, asked))
    assert sorted(actual) == list(range(len(asked)))
    for place, pattern in enumerate(asked):
        alone = set_layers(copy.deepcopy(model), pattern.layers, keep_sink)
        set_attention(alone, bidirectional=True)
        for row, ids in enumerate(ROWS):  # without any padding
            with torch.no_grad():
                own = alone.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            torch.testing.assert_close(actual[place][row, : len(ids)], own, msg=pattern.name)


@pytest.mark.parametrize(
    ("family", "said"),
    [("gpt2", "expected a family whose base model has layers"), ("llama", "no final norm after")],
)
def test_a_family_that_keeps_its_parts_elsewhere_is_refused(family, said):
    model = random_model(family)
    model.base_model.norm = None
    parts = (layers_of, final_norm)
    with pytest.raises(UserError, match=said):
        [part(model) for part in parts]


def test_patterns_differ():
    model = random_model("llama", num_hidden_layers=DEPTH).eval()
    actual = [state[1][0] for state in states(model, INPUTS, EVERY)]
    for number, one in enumerate(actual):
        assert all((one - other).abs().max() > 1e-4 for other in actual[:number])


def test_what_patterns_share_is_computed_once():
    model = random_model("llama", num_hidden_layers=DEPTH).eval()
    calls = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    for _ in states(model, INPUTS, EVERY):
        pass
    beginnings = {item.both[:depth] for item in EVERY for depth in range(1, DEPTH + 1)}
    assert len(calls) == DEPTH + len(beginnings) < DEPTH * len(EVERY)


@pytest.mark.parametrize("mask", [("all",), ([1],), ([1], True)])
@pytest.mark.parametrize("both", [False, True])
def test_the_model_is_left_as_it_was(mask, both):
    model = random_model("llama", num_hidden_layers=DEPTH).eval()
    set_attention(set_layers(model, *mask), both)
    before = model.config.to_dict(), model.config._attn_implementation
    walk = states(model, INPUTS, KEPT)
    next(walk)
    walk.close()  # half-way
    assert (model.config.to_dict(), model.config._attn_implementation) == before
    assert is_bidirectional(model.config) is both


def test_no_other_token_sees_a_first_token_that_is_removed():
    """Against the library's own attention with a mask written out by hand."""
    readings = ScanSection(patterns=[], first_token=["full", "kept", "removed"])
    asked = patterns(readings, DEPTH, keep_sink=False)
    assert [(item.name, item.first_token) for item in asked] == [
        ("none", "full"),
        ("all", "full"),
        ("all", "kept"),
        ("all", "removed"),
    ]
    model = random_model("llama", num_hidden_layers=DEPTH).eval()
    last = dict(states(model, INPUTS, asked))[3]
    inner = random_model("llama", num_hidden_layers=DEPTH).eval().base_model
    inner.load_state_dict(model.base_model.state_dict())
    inner.set_attn_implementation("eager")
    for row, ids in enumerate(ROWS):
        hidden = torch.zeros(1, 1, len(ids), len(ids))
        hidden[..., 0] = torch.finfo(torch.float32).min
        with torch.no_grad():
            own = inner(input_ids=torch.tensor([ids]), attention_mask=hidden).last_hidden_state[0]
        torch.testing.assert_close(last[row, : len(ids)], own)


def test_the_first_real_token_is_removed_and_no_other():
    inputs = {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])}
    assert without_first(inputs)["attention_mask"].tolist() == [[0, 0, 0, 1], [0, 1, 1, 0]]
    assert inputs["attention_mask"][1].tolist() == [1, 1, 1, 0]
