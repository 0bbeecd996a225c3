"""Every swap against a model whose layer really was exchanged, and a slow bootstrap."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from builders import random_model, run
from torch.nn.functional import cross_entropy

from ubmoe.config import with_keys
from ubmoe.data.chats import Chat
from ubmoe.interventions import swap

DEPTH = 3
SCALED = [(family, 3) for family in ("gemma2", "granite", "cohere")]


def chat(ids, answer):
    return Chat("here", ids, answer, ["answer"] * len(ids))


CHATS = [
    chat([5, 6, 7, 8, 9, 10], [False, False, False, True, True, True]),
    chat([11, 12, 13], [True, False, True]),
    chat([20, 21, 22, 23], [False, True, True, True]),
]


@pytest.fixture
def models(family):
    """The model and its encoder; some families bend or scale their logits."""
    keys = {
        "gemma2": {"final_logit_softcapping": 2.0},
        "granite": {"logits_scaling": 7.0, "residual_multiplier": 0.3, "embedding_multiplier": 2.0},
        "cohere": {"logit_scale": 0.1},
    }
    base = random_model(family, num_hidden_layers=DEPTH, **keys.get(family, {}))
    encoder = copy.deepcopy(base)
    with torch.no_grad():
        for number, layer in enumerate(encoder.model.layers):
            layer.mlp.up_proj.weight += 0.1 * (number + 1)
    return base, encoder


def by_hand(model, one):
    with torch.no_grad():
        logits = model(torch.tensor([one.ids])).logits[0].double()
    places = [place for place, answer in enumerate(one.answer) if answer and place]
    return sum(
        cross_entropy(logits[place - 1], torch.tensor(one.ids[place])).item() for place in places
    )


def test_the_choices_are_both_models_and_every_layer_in_and_back():
    yes, no = True, False
    actual = swap.choices(2)
    assert actual == [(no, no), (yes, yes), (yes, no), (no, yes), (no, yes), (yes, no)]


@pytest.mark.parametrize(("family", "batch"), [("qwen2", 1), ("qwen2", 3), *SCALED])
def test_losses_are_those_of_models_whose_layer_was_exchanged(models, batch):
    base, encoder = models
    asked = swap.choices(DEPTH)
    parts = [CHATS[start : start + batch] for start in range(0, 3, batch)]
    actual = np.concatenate([swap.losses(base, encoder, part, asked) for part in parts], axis=1)
    for own, row in zip(asked, actual, strict=True):
        mixed = copy.deepcopy(base)
        for number, tuned in enumerate(own):
            if tuned:
                mixed.model.layers[number] = copy.deepcopy(encoder.model.layers[number])
        assert row == pytest.approx([by_hand(mixed, chat) for chat in CHATS], rel=1e-5)


def test_the_summary_is_in_nats_a_token():
    lost = np.array([[4.0, 2.0], [8.0, 4.0], [6.0, 2.0], [4.0, 5.0], [5.0, 4.0], [8.0, 1.0]])
    actual = swap.summary(lost, np.array([2, 1]))
    assert actual["perplexity"] == {"base": math.exp(2), "encoder": math.exp(4)}
    changes = [(row["in"]["change"], row["back"]["change"]) for row in actual["layers"]]
    assert changes == [
        (pytest.approx(8 / 3 - 2), pytest.approx(3 - 4)),
        (pytest.approx(3 - 2), pytest.approx(3 - 4)),
    ]
    assert actual["whole"]["change"] == pytest.approx(2)
    answers = [actual["whole"], *(row[word] for row in actual["layers"] for word in ("in", "back"))]
    assert [answer["by_answer"]["change"] for answer in answers] == [
        pytest.approx(item / 2) for item in (2 + 2, 1 + 0, -1.5 + 0, 0 + 3, 0 - 3)
    ]
    assert (actual["chats"], actual["tokens"]) == (2, 3)


def test_the_interval_is_a_bootstrap_over_chats():
    rng = np.random.default_rng(0)
    counts, lost = rng.integers(3, 9, 40), rng.gamma(5, 2, (4, 40))
    own = swap.summary(lost, counts)["layers"][0]["in"]
    slow = []
    for _ in range(3000):
        drawn = rng.integers(0, 40, 40)
        slow.append((lost[2] - lost[0])[drawn].sum() / counts[drawn].sum())
    assert own["interval"] == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.06)


@pytest.mark.parametrize("family", ["qwen2"])
def test_an_interrupted_run_goes_on(models, config, tmp_path, monkeypatch):
    config = with_keys(config, ["swap.batch_tokens=6", "resume=auto"])
    whole = swap.swap(*models, CHATS, config, tmp_path)
    real, seen = swap.losses, []

    def dying(base, encoder, chats, asked):
        seen.append(len(chats))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(base, encoder, chats, asked)

    with monkeypatch.context() as patch:
        patch.setattr(swap, "losses", dying)
        with pytest.raises(KeyboardInterrupt):
            swap.swap(*models, CHATS, config, tmp_path)
    monkeypatch.setattr(swap, "losses", lambda *given: seen.append(len(given[2])) or real(*given))
    assert swap.swap(*models, CHATS, config, tmp_path) == whole
    assert seen == [1, 1, 1, 1]  # the second one twice


@pytest.mark.slow
def test_the_program_writes_a_record_a_table_and_a_picture(tmp_path, tiny_path):
    keys = [f"output_dir={tmp_path}/some", f"ubmoe.bi={tiny_path}", "ubmoe.max_rows=60"]
    keys += ["ubmoe.held_out=16", "swap.max_chats=8"]
    status, said, errors = run("configs/tiny.yaml", *keys, script="-m ubmoe.swap")
    assert status == 0 and said.strip().endswith("swap.json"), errors
    result = json.loads((tmp_path / "some" / "swap.json").read_text())["swap"]
    assert result["chats"] == 8 and result["bi_weights"]
    assert result["perplexity"]["base"] == result["perplexity"]["encoder"]  # the model itself
    assert {row["in"]["change"] for row in result["layers"]} == {0.0}
    assert (tmp_path / "some" / "swap.png").stat().st_size > 1000
