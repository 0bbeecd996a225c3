"""Models with each other's sinks: matched shares, the control, and the program."""

import copy
import json

import pytest
import torch
from builders import random_model, run
from safetensors.torch import load_file, save_file

from ubmoe.config import with_keys
from ubmoe.data.chats import Chat
from ubmoe.evaluate.generation import perplexity
from ubmoe.interventions import shift
from ubmoe.report.tables import shift_text

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


@pytest.fixture
def asked(config):
    return with_keys(config, ["evaluation.bf16=false"])


def used(model, shifted=None):
    """(L, H), by a forward a chat."""
    with shift.shifting(model) as attention:
        attention.by_layer = shifted or {}
        return torch.stack([shift.shares(model, attention, [one], False)[0] for one in CHATS])


def test_each_gets_the_others_share_in_every_head(models, asked):
    actual = shift.shift(*models, CHATS, asked)
    readings, exchanges = actual["readings"], actual["exchanges"]
    assert actual["chats"] == actual["matched"] == 3 and actual["tokens"] == 7
    assert not torch.allclose(used(models[0]), used(models[1]), atol=0.02)
    for name, model, theirs in (("in", *models), ("back", *models[::-1])):
        own = {n: torch.tensor(item) for n, item in enumerate(exchanges[name]["shifts"])}
        assert torch.allclose(used(model, own).mean(0), used(theirs).mean(0), atol=1e-4)
        assert exchanges[name]["gap"] < 0.01 and 0 < exchanges[name]["by_row"] < 100
        moved = {n: item.roll(1) for n, item in own.items()}
        with shift.shifting(model) as attention:
            attention.by_layer = moved
            expected = perplexity(model, CHATS)["perplexity"]
        assert readings[f"{name} elsewhere"]["perplexity"] == pytest.approx(expected)
        scaled_by = scaled(model, (1 - used(theirs).mean(0)) / (1 - used(model).mean(0)))
        expected = perplexity(scaled_by, CHATS)["perplexity"]
        assert readings[f"{name} scaled"]["perplexity"] == pytest.approx(expected, rel=1e-3)
        assert readings[f"{name} scaled"]["perplexity"] != pytest.approx(
            readings["model" if name == "in" else "encoder"]["perplexity"], rel=1e-2
        )
    for name, model in zip(("model", "encoder"), models, strict=True):  # as they are
        expected = perplexity(model, CHATS)["perplexity"]
        assert readings[name]["perplexity"] == pytest.approx(expected, rel=1e-5)


def scaled(model, factors):
    """A copy whose output projections take each head's numbers times its factor, (L, H)."""
    again = copy.deepcopy(model)
    with torch.no_grad():
        for layer, by_head in zip(again.model.layers, factors, strict=True):
            width = layer.self_attn.o_proj.in_features // len(by_head)
            layer.self_attn.o_proj.weight *= by_head.repeat_interleave(width)
    return again


def half_predicted(model):
    """A chat whose answer is the likeliest token at every second place, so that a temperature pays.

    Of random tokens the best would be without end.
    """
    ids = [5]
    for place in range(12):
        with torch.no_grad():
            likeliest = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(likeliest if place % 2 else 20 + place)
    return Chat("here", ids, [False] + [True] * 12, ["answer"] * 13)


def at_temperature(model, chat, temperature):
    """Nats a token, by the logits as they are."""
    with torch.no_grad():
        logits = model(torch.tensor([chat.ids])).logits[0, :-1] / temperature
    return torch.nn.functional.cross_entropy(logits, torch.tensor(chat.ids[1:])).item()


def test_the_temperature_is_the_best_of_all(models, asked):
    chat = half_predicted(models[1])
    actual = shift.shift(*models, [chat], asked)
    tried = torch.linspace(-1.3, 1.3, 2000).exp().tolist()
    best = min(tried, key=lambda temperature: at_temperature(models[1], chat, temperature))
    assert 0.3 < best < 3.5 and abs(best - 1) > 0.1  # neither an end nor none
    assert actual["temperature"] == pytest.approx(best, rel=0.005)
    [lost] = actual["readings"]["temperature"]["answers"]["losses"]
    expected = at_temperature(models[1], chat, best)
    assert lost / 12 == pytest.approx(expected, rel=1e-4)
    [as_it_is] = actual["readings"]["encoder"]["answers"]["losses"]
    assert as_it_is / 12 == pytest.approx(at_temperature(models[1], chat, 1.0), rel=1e-4)
    assert as_it_is / 12 > expected + 1e-3


def test_shares_may_be_matched_on_some_of_the_chats(models, asked):
    actual = shift.shift(*models, CHATS, with_keys(asked, ["shift.matched=1"]))
    assert (actual["chats"], actual["matched"]) == (3, 1) and actual["exchanges"]["in"][
        "gap"
    ] < 0.01
    assert actual["readings"]["in"]["used"] != pytest.approx(actual["readings"]["encoder"]["used"])


def test_what_is_seen_is_a_mean_over_chats_whatever_the_batches(models):
    with shift.shifting(models[0]) as attention:
        attention.seen.clear()
        for part in (CHATS[:1], CHATS[1:]):
            perplexity(models[0], part)
        actual = shift.mean_seen(models[0], attention)[..., 0]
    assert torch.allclose(actual, used(models[0]).mean(0), atol=1e-5)


def test_a_model_and_itself_lose_nothing(models, asked):
    actual = shift.shift(models[0], copy.deepcopy(models[0]), CHATS, asked)["changes"]
    exchanged = [
        name for name in actual if "temperature" not in name
    ]  # which any model may gain by
    assert {name: actual[name]["change"] for name in exchanged} == pytest.approx(
        dict.fromkeys(exchanged, 0.0), abs=1e-4
    )
    assert actual["in"]["of_whole"] is None  # of nothing


@pytest.mark.slow
def test_the_program_writes_a_record_a_table_and_a_picture(tmp_path, tiny_path):
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    for item in tiny_path.iterdir():
        if item.is_file() and item.suffix != ".safetensors":
            (encoder / item.name).write_bytes(item.read_bytes())
    weights = load_file(tiny_path / "model.safetensors")
    weights = {n: 0.8 * w if "k_proj.weight" in n else w for n, w in weights.items()}
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})
    keys = [f"output_dir={tmp_path}/some", f"ubmoe.bi={encoder}", "ubmoe.max_rows=60"]
    keys += ["ubmoe.held_out=16", "shift.max_chats=8"]
    status, said, errors = run("configs/tiny.yaml", *keys, script="-m ubmoe.shift")
    assert status == 0 and said.strip().endswith("shift.json"), errors
    result = json.loads((tmp_path / "some" / "shift.json").read_text())
    assert result["shift"]["chats"] == 8 and result["shift"]["bi_weights"]
    lines = shift_text(result).splitlines()
    read = ["model", "encoder", *["in"] * 3, *["back"] * 3, "temperature"]
    assert [line.split()[0] for line in lines[2:11]] == read
    assert (tmp_path / "some" / "shift.png").stat().st_size > 1000
