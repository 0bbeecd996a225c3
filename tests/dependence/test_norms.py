"""Norms of states by layer, against states of one text at a time and laws of the masks."""

import pytest
import torch
from builders import random_model

from ubmoe.bidirectional import is_bidirectional, set_attention, set_layers
from ubmoe.dependence import norms as measured
from ubmoe.dependence.norms import norms

TEXTS = [[5, 6, 7, 8, 9], [12], [20, 21, 22]]
LAYERS = 4


def by_hand(model):
    """(first, others) mean norms by layer, each text alone."""
    first, others = [], []
    for text in TEXTS:
        with torch.no_grad():
            states = model.base_model(torch.tensor([text]), output_hidden_states=True)
        sizes = torch.stack(states.hidden_states[:-1])[:, 0].norm(dim=-1)
        first.append(sizes[:, 0])
        others += list(sizes[:, 1:].T)
    return [torch.stack(item).mean(0).tolist() for item in (first, others)]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_norms_are_those_of_each_text_under_each_mask(family, before):
    model = set_layers(random_model(family, num_hidden_layers=LAYERS), [1], keep_sink=before)
    set_attention(model, before)
    left = model.config.to_dict(), model.config._attn_implementation
    actual = norms(model, TEXTS, False)
    assert (model.config.to_dict(), model.config._attn_implementation) == left
    assert is_bidirectional(model.config) is before
    for name, (bidirectional, keep_sink) in {
        "causal": (False, False),
        "bidirectional": (True, False),
        "sink kept": (True, True),
    }.items():
        alone = random_model(family, num_hidden_layers=LAYERS)
        set_attention(set_layers(alone, "all", keep_sink), bidirectional)
        for who, expected in zip(("first", "others"), by_hand(alone), strict=True):
            assert actual[name][who] == pytest.approx(expected, rel=1e-4), (name, who)
    assert actual["causal"]["first"] == pytest.approx(actual["sink kept"]["first"], rel=1e-6)
    assert actual["causal"]["first"] != pytest.approx(actual["bidirectional"]["first"], rel=1e-3)


def test_few_texts_are_read_and_cut(monkeypatch):
    monkeypatch.setattr(measured, "TEXTS", 2)
    monkeypatch.setattr(measured, "TOKENS", 2)
    model = random_model("llama")
    assert norms(model, [[5, 6, 7], [1, 2], [20, 21]], False) == norms(
        model, [[5, 6], [20, 21]], False
    )
    assert norms(model, [[5]], False)["causal"]["others"] == [None, None]


@pytest.mark.parametrize(
    ("family", "sizes", "masks"),
    [
        ("stablelm", {}, ["causal"]),  # stays causal
        ("gemma2", {}, ["causal", "bidirectional"]),  # a soft cap
    ],
)
def test_a_mask_that_a_family_cannot_have_is_left_out(family, sizes, masks, caplog):
    model = random_model(family, **sizes)
    caplog.set_level("INFO", "ubmoe")
    assert list(norms(model, TEXTS, False)) == masks
    assert not is_bidirectional(model.config)
    assert "no norms of states, sink kept: " in caplog.text
