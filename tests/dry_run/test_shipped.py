"""Without a hub: published shapes, counted rows, and one line for what is neither."""

import socket

import pytest
from builders import ROOT
from transformers import AutoConfig

from ubmoe.config import UserError, load_config
from ubmoe.dry_run import memory, programs, shipped

# Parameters as the model cards print them: Qwen's "Number of Parameters", in billions.
CARDS = {
    "Qwen/Qwen2.5-0.5B-Instruct": "0.49",
    "Qwen/Qwen2.5-1.5B-Instruct": "1.54",
    "Qwen/Qwen2.5-3B-Instruct": "3.09",
    "Qwen/Qwen2.5-7B-Instruct": "7.61",
    "Qwen/Qwen2.5-14B-Instruct": "14.7",
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": "0.49",
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": "1.54",
    "Qwen/Qwen3-0.6B": "0.6",
    "Qwen/Qwen3-1.7B": "1.7",
    "Qwen/Qwen3-4B": "4.0",
    "Qwen/Qwen3-8B": "8.2",
    "google/gemma-3-270m": "0.27",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "0.13",
}
NO_LIMIT = ["ubmoe.max_rows=null", "model.device=cpu"]


@pytest.fixture(autouse=True)
def no_names(monkeypatch, tmp_path):
    """A look-up of a hub's name fails the test; nothing is in the hub's cache."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *names, **_: asked.append(names) or [])
    monkeypatch.setattr(shipped, "_is_cached", lambda model: False)
    monkeypatch.setattr(programs, "_smaller", lambda *_: [])
    yield asked
    assert not asked


def test_every_model_of_configs_is_shipped_with_its_source():
    names = {load_config(path).model.name for path in (ROOT / "configs").glob("*.yaml")}
    assert names - {"tiny"} == set(shipped.SHIPPED["models"])
    for name, model in shipped.SHIPPED["models"].items():
        assert model["source"] == f"https://huggingface.co/{name}/blob/main/config.json"


@pytest.mark.parametrize("name", CARDS)
def test_a_shape_has_as_many_parameters_as_its_card_says(name):
    config = dict(shipped.SHIPPED["models"][name]["config"])
    with memory.shapes():
        model = memory.shaped(AutoConfig.for_model(config.pop("model_type"), **config), "float32")
    last = 10.0 ** -len(CARDS[name].partition(".")[2])  # some are rounded, some are cut
    assert abs(model.num_parameters() / 1e9 - float(CARDS[name])) < last


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (programs.calculate_dp, "1000 texts, 2048000 tokens"),
        (programs.train_bi, "20 steps of 64 on one device, 20000 rows"),
        (programs.train_ubmoe, "2475 steps of 8 on one device, 19800 rows"),
        (programs.bitune, "3000 steps of 2 on one device, 9800 rows"),
    ],
)
def test_a_shipped_config_is_answered_without_a_hub(script, said):
    """The recipe has 20 steps of 20000 sentences; 200 chats are held out of 20000 and of 10000."""
    config = load_config(ROOT / "configs" / "qwen2.5-0.5b.yaml", ["model.device=cpu"])
    output = script(config)
    assert output.startswith("Qwen/Qwen2.5-0.5B-Instruct: Qwen2") and said in output, output
    assert f"Qwen/Qwen2.5-0.5B-Instruct {shipped.COUNTED}" in output
    assert "ubmoe-shape" not in output


def test_steps_are_those_of_the_devices_that_are_asked_about():
    keys = ["model.device=cpu", "dry_run=8", "bi.stages.0.max_steps=-1"]
    output = programs.train_bi(load_config(ROOT / "configs" / "qwen2.5-0.5b.yaml", keys))
    assert "39 steps of 64 on each of 8 devices, 20000 rows" in output  # 2500 rows on each


def test_rows_of_a_file_are_counted_and_none_is_longer_than_counted(tmp_path, tiny_path):
    """With a model that is here the same rows are read; its step is no larger."""
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(f"the {'cat ' * (number % 9)}{number}" for number in range(40)))
    keys = [f"bi.stages.0.dataset={path}", "bi.stages.0.max_rows=null", "model.device=cpu"]
    there = programs.train_bi(load_config(ROOT / "configs" / "tiny.yaml", keys))
    shape = programs.train_bi(load_config(ROOT / "configs" / "smollm2-135m.yaml", keys))
    assert "40 rows" in there and "40 rows" in shape
    assert shipped.COUNTED in shape and shipped.COUNTED not in there


def test_a_model_that_is_neither_here_nor_shipped_is_one_line(monkeypatch):
    monkeypatch.setattr(shipped, "hub_answers", lambda: False)
    config = load_config(None, ["model.name=someone/model", "model.device=cpu"])
    with pytest.raises(UserError, match="someone/model is not on this machine, and no hub answers"):
        programs.train_bi(config)


def test_rows_whose_number_is_not_known_need_a_limit():
    config = load_config(ROOT / "configs" / "qwen2.5-0.5b.yaml", NO_LIMIT)
    with pytest.raises(UserError, match="number of rows is not known; expected a limit"):
        programs.train_ubmoe(config)


def test_masked_stages_need_the_texts_themselves():
    stage = "{objective: mntp, train: [ffn], dataset: tiny}"
    keys = [f"bi.stages=[{stage}]", "model.device=cpu"]
    config = load_config(ROOT / "configs" / "qwen2.5-0.5b.yaml", keys)
    with pytest.raises(UserError, match="counted in tokens"):
        programs.train_bi(config)


def test_a_hub_that_does_not_answer_is_given_up_on(monkeypatch):
    monkeypatch.setattr(shipped, "PATIENCE", 0.05)
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    assert shipped.hub_answers() is False
