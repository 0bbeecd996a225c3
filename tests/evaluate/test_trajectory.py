"""A run scored on its way: its points are those of shorter runs, its weights of an unscored one."""

import pytest
import torch
from builders import KilledError, random_model
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from ubmoe.config import LoraSection, UserError, load_config
from ubmoe.encoder.contrastive import ContrastiveTrainer
from ubmoe.encoder.sentence_encoder import as_encoder
from ubmoe.encoder.stages import read_data, train_stages
from ubmoe.evaluate.generation import perplexity
from ubmoe.evaluate.sts import sts_scores
from ubmoe.evaluate.trajectory import Trajectory, parted
from ubmoe.report import figures

LORA = LoraSection(rank=2)
KEYS = [
    *("trajectory.steps=[2, 3]", "trajectory.perplexity=[tiny]", "trajectory.max_texts=5"),
    *("bi.stages.0.lr_scheduler_type=constant", "bi.stages.0.per_device_train_batch_size=4"),
    *("bi.stages.0.max_rows=40", "bi.stages.0.save_steps=1", "bi.prompt=null"),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


def trained(tokenizer, folder, steps, scored=True, lora=None, resume="never"):
    """(encoder, its model, what the record says) of a random model after so many steps."""
    config = load_config(None, [*KEYS, f"output_dir={folder}", f"resume={resume}"])
    stage = config.bi.stages[0].model_copy(update={"max_steps": steps, "lora": lora})
    config = config.model_copy(update={"bi": config.bi.model_copy(update={"stages": [stage]})})
    model = random_model("qwen2", vocab_size=len(tokenizer))
    model.config.is_causal = False
    encoder = as_encoder(model, tokenizer, config.bi)
    scoring = Trajectory(config, tokenizer).callback if scored else None
    reports = train_stages(
        config, [read_data(stage, tokenizer)], encoder, model, tokenizer, scoring
    )
    return encoder, model, parted(reports)


def test_points_are_the_scores_of_shorter_runs_and_disturb_nothing(tokenizer, tmp_path):
    encoder, model, record = trained(tokenizer, tmp_path / "scored", 3)
    assert [point["step"] for point in record["trajectory"]] == [0, 2, 3]
    assert all("point" not in row for row in record["stages"][0]["log"])
    shorter, short_model, unscored = trained(tokenizer, tmp_path / "short", 2, scored=False)
    assert "trajectory" not in unscored
    config = load_config(None, KEYS)
    asked = Trajectory(config, tokenizer)
    expected = sts_scores(shorter, asked.tasks, 8)["tasks"]
    assert record["trajectory"][1]["sts"]["tasks"] == pytest.approx(expected, abs=1e-3)
    short_model.config.is_causal = True
    lost = perplexity(short_model, asked.texts["tiny"])["perplexity"]
    assert record["trajectory"][1]["perplexity"]["tiny"]["perplexity"] == pytest.approx(lost)
    _, plain, _ = trained(tokenizer, tmp_path / "plain", 3, scored=False)
    own = dict(model.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in plain.named_parameters())
    assert not model.config.is_causal and "trajectory.png" in figures.trajectory(
        record["trajectory"]
    )


def test_points_survive_a_kill(tokenizer, tmp_path, dying, monkeypatch):
    whole = trained(tokenizer, tmp_path / "whole", 3)[2]["trajectory"]
    with monkeypatch.context():
        dying(ContrastiveTrainer, 3)
        with pytest.raises(KilledError):
            trained(tokenizer, tmp_path / "killed", 3)
    monkeypatch.undo()
    resumed = trained(tokenizer, tmp_path / "killed", 3, resume="auto")[2]["trajectory"]
    assert resumed == whole
    again = trained(tokenizer, tmp_path / "killed", 3, resume="auto")[2]["trajectory"]
    assert again == whole


@pytest.mark.parametrize("lora", [None, LORA])
def test_distance_is_that_of_the_trained_matrices(tokenizer, tmp_path, lora):
    _, model, record = trained(tokenizer, tmp_path, 2, lora=lora)
    before = dict(random_model("qwen2", vocab_size=len(tokenizer)).named_parameters())
    moved = whole = 0.0
    for name, value in model.named_parameters():
        if ".mlp." in name:
            moved += (value - before[name]).detach().double().square().sum()
            whole += before[name].detach().double().square().sum()
    actual = [point["distance"] for point in record["trajectory"]]
    assert actual[0] == 0 and actual[1] == pytest.approx(float((moved / whole).sqrt()), rel=1e-4)


def test_every_token_of_a_text_counts(tokenizer, tmp_path):
    (tmp_path / "plain.txt").write_text("The dog sees the old house.\n\nAnna sleeps.\n" * 8)
    keys = [f"trajectory.perplexity=[{tmp_path}/plain.txt]", "trajectory.max_tokens=20"]
    [(name, chunks)] = Trajectory(load_config(None, [*KEYS, *keys]), tokenizer).texts.items()
    ids = torch.tensor([chunk.ids for chunk in chunks])
    text = (tmp_path / "plain.txt").read_text().replace("\n\n", "\n")
    assert name == "plain" and ids.shape == (5, 20)
    assert ids.flatten().tolist() == tokenizer(text)["input_ids"][:100]
    model = random_model("qwen2", vocab_size=len(tokenizer))
    logits = model(ids).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    assert perplexity(model, chunks)["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_two_texts_of_one_name_are_refused(tokenizer, tmp_path):
    keys = [f"trajectory.perplexity=[{tmp_path}/a.txt, {tmp_path}/b/a.txt]"]
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "a.txt", tmp_path / "b" / "a.txt"):
        path.write_text("The dog sees the old house.\n" * 200)
    with pytest.raises(UserError, match="trajectory.perplexity: two of one name"):
        Trajectory(load_config(None, [*KEYS, *keys]), tokenizer)
