"""Models with each other's sinks: matched shares, known changes, and the program."""

import copy
import json
import math

import pytest
import torch
from builders import random_model, run

from ubmoe.config import with_keys
from ubmoe.data.chats import Chat
from ubmoe.shift import shifts

CHATS = [
    Chat("here", [5, 6, 7, 8, 9, 10], [False, False, False, True, True, True], ["answer"] * 6),
    Chat("here", [11, 12, 13], [True, False, True], ["answer"] * 3),
    Chat("here", [20, 21, 22, 23], [False, True, True, True], ["answer"] * 4),
]


@pytest.fixture
def models():
    base = random_model("qwen2")
    encoder = copy.deepcopy(base)
    with torch.no_grad():
        for layer in encoder.model.layers:
            layer.self_attn.k_proj.weight *= 0.7
    return base, encoder


def test_each_gets_the_others_share_in_every_head(models, config):
    found = shifts.shift(*models, CHATS, with_keys(config, ["evaluation.bf16=false"]))
    readings = found["readings"]
    assert found["chats"] == found["matched"] == 3 and found["tokens"] == 7
    assert readings["model"]["first"] != pytest.approx(readings["encoder"]["first"], abs=0.5)
    assert readings["in"]["first"] == pytest.approx(readings["encoder"]["first"], abs=1e-3)
    assert readings["back"]["first"] == pytest.approx(readings["model"]["first"], abs=1e-3)
    with shifts.shifting(models[0]) as shifted:
        shifted.by_layer = {n: torch.tensor(own) for n, own in enumerate(found["shifts"]["in"])}
        shares = shifts.shares(models[0], shifted, CHATS, False)[..., 0]
    with shifts.shifting(models[1]) as plain:
        wanted = shifts.shares(models[1], plain, CHATS, False)[..., 0]
    assert torch.allclose(shares, wanted, atol=1e-4)


def test_a_model_and_itself_lose_nothing(models, config):
    found = shifts.shift(models[0], copy.deepcopy(models[0]), CHATS, config)
    losses = [each["perplexity"] for each in found["readings"].values()]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)


def test_changes_are_in_nats_a_token_and_parts_of_the_whole():
    lost = {"model": [2.0, 4.0], "encoder": [6.0, 8.0], "in": [3.0, 4.0], "back": [4.0, 8.0]}
    readings = {
        name: {"answers": {"losses": each, "tokens": [1, 3]}} for name, each in lost.items()
    }
    found = shifts.changes(readings)
    assert [found[name]["change"] for name in found] == [8 / 4, 1 / 4, -2 / 4]
    assert [found[name]["of_whole"]["part"] for name in ("in", "back")] == [1 / 8, 2 / 8]
    answers = [found[name]["by_answer"]["change"] for name in found]
    assert answers == pytest.approx([(4 + 4 / 3) / 2, 1 / 2, -2 / 2])
    low, high = found["in"]["interval"]
    assert (low, high) == (0.0, 1.0)  # draws of the one chat alone, and of the other


@pytest.mark.slow
def test_the_program_writes_a_record_and_a_table(tmp_path, tiny_path):
    keys = [f"output_dir={tmp_path}/some", f"ubmoe.bi={tiny_path}", "ubmoe.max_rows=60"]
    keys += ["ubmoe.held_out=16", "shift.max_chats=8"]
    status, said, errors = run("configs/tiny.yaml", *keys, script="-m ubmoe.shift")
    assert status == 0 and said.strip().endswith("shift.json"), errors
    result = json.loads((tmp_path / "some" / "shift.json").read_text())["shift"]
    assert result["chats"] == 8 and result["bi_weights"]
    for reading in result["readings"].values():  # the model itself
        assert reading["perplexity"] == pytest.approx(result["readings"]["model"]["perplexity"])
        assert not math.isnan(reading["after"])
