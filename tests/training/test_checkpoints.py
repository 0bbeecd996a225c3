"""The same run is the same data and weights, whatever their paths; the log says what is another."""

import pytest
import torch
from builders import join, pair, random_model
from transformers import AutoTokenizer

from ubmoe.bitune import training as instruct
from ubmoe.bitune.model import attach
from ubmoe.config import BiSection, BituneSection, MoeSection, StageSection
from ubmoe.data.chats import Chat
from ubmoe.data.prompts import Example
from ubmoe.encoder import contrastive, mntp
from ubmoe.encoder.sentence_encoder import as_encoder
from ubmoe.moe import router_training
from ubmoe.training.checkpoints import Work

STEPS = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
SENTENCES = ("The dog sleeps.", "A cook burned the pie.", "Anna lives there.", "It rains today.")
OTHERS = ("The cat sleeps.", "A cook burned the pie.", "Anna lives there.", "It rains today.")


def moved(model, name):
    """The model with one row of one of its matrices changed, as a patched checkpoint has it."""
    with torch.no_grad():
        dict(model.named_parameters())[name][3] += 0.01
    return model


def stage_of(objective, tokenizer, path, directory, resume, texts, patched):
    path.write_text("\n".join(texts))
    longest = 8 if objective == "mntp" else 64
    more = {"objective": objective, "dataset": str(path), "max_tokens": longest, "lora": None}
    stage = StageSection(**STEPS | more)
    model = random_model("qwen2", vocab_size=len(tokenizer))
    model.name_or_path = str(path)
    if patched:
        moved(model, "model.layers.1.self_attn.q_proj.weight")
    work = Work(directory, 0, resume)
    if objective == "mntp":
        chunks = mntp.chunked(stage, tokenizer)
        report = mntp.train_stage(model, tokenizer, stage, chunks, work)
    else:
        encoder = as_encoder(model, tokenizer, BiSection())
        rows, _ = contrastive.read_dataset(stage, tokenizer)
        report = contrastive.train_stage(encoder, model, stage, rows, work)
    return report["log"]


def routers_of(tokenizer, path, directory, resume, texts, patched):
    rows = [tokenizer(text)["input_ids"] for text in texts]
    chats = [Chat(f"{path}:1", ids, [True] * len(ids), ["answer"] * len(ids)) for ids in rows]
    uni, bi = pair(vocab_size=len(tokenizer))
    if patched:
        moved(bi, "model.layers.1.mlp.up_proj.weight")
    return router_training.train(
        join(uni, bi), MoeSection(**STEPS), chats, Work(directory, 0, resume)
    )


def bitune_of(tokenizer, path, directory, resume, texts, patched):
    rows = [tokenizer(text)["input_ids"] for text in texts]
    examples = [Example(ids[:2], ids[2:]) for ids in rows]
    model = random_model("qwen2", vocab_size=len(tokenizer))
    if patched:
        moved(model, "model.layers.1.self_attn.q_proj.weight")
    keys = BituneSection(**STEPS)
    return instruct.train(attach(model, keys, 0), keys, examples, Work(directory, 0, resume))


RUNS = {
    "simcse": lambda *given: stage_of("simcse", *given),
    "mntp": lambda *given: stage_of("mntp", *given),
    "routers": routers_of,
    "bitune": bitune_of,
}


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_told_from_another_by_what_it_read_and_not_by_where(
    kind, tokenizer, tmp_path, caplog
):
    caplog.set_level("INFO", "ubmoe")

    def run(resume, name="a.txt", texts=SENTENCES, patched=False):
        caplog.clear()
        path = tmp_path / name
        log = RUNS[kind](tokenizer, path, tmp_path / "work", resume, texts, patched)
        return [row["loss"] for row in log if "loss" in row], caplog.text

    first, _ = run(False)
    again, said = run(True, "elsewhere.txt")
    assert again == first and "trained to the end before" in said
    other, said = run(True, texts=OTHERS)  # as many rows, under the same path
    assert other != first and "work: of another run (other data); starting afresh" in said
    other, said = run(True, texts=OTHERS, patched=True)
    assert "work: of another run (other weights); starting afresh" in said
    assert run(False, texts=OTHERS, patched=True)[0] == other
    assert "trained to the end before" in run(True, texts=OTHERS, patched=True)[1]
    assert "(other data, weights)" in run(True)[1]


def test_half_a_mark_is_none(tokenizer, tmp_path):
    given = (tokenizer, tmp_path / "a.txt", tmp_path / "work")
    first = bitune_of(*given, False, SENTENCES, False)
    mark = tmp_path / "work" / "stage.json"
    mark.write_text(mark.read_text()[:50])
    again = bitune_of(*given, True, SENTENCES, False)
    assert [row.get("loss") for row in again] == [row.get("loss") for row in first]
    assert mark.read_text().endswith("}")
