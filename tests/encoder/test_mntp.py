"""Masks as published and reproducible, the loss by hand, and a run that was killed."""

import numpy as np
import pytest
import torch
from builders import KilledError, random_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe.config import StageSection, UserError
from ubmoe.data.padding import IGNORE_INDEX
from ubmoe.encoder import mntp as masked
from ubmoe.encoder.mntp import Chunks, Masking, Places, chunked
from ubmoe.training.checkpoints import StageRun
from ubmoe.training.modules import named_by


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


def stage(**keys):
    common = {"objective": "mntp", "max_tokens": 32, "per_device_train_batch_size": 4}
    return StageSection(**common | {"max_steps": 3, "logging_steps": 1} | keys)


def test_the_defaults_are_those_of_llm2vec():
    actual = StageSection(objective="mntp")
    assert (actual.max_tokens, actual.per_device_train_batch_size) == (512, 32)
    assert (actual.mlm_probability, actual.masking, actual.mask_token) == (0.2, "bert", "_")
    assert actual.lora is not None and (actual.lora.rank, actual.lora.alpha) == (16, 32)
    assert actual.learning_rate == 5e-5 and actual.train == ["ffn", "attention"]


@pytest.mark.parametrize("style", ["bert", "all"])
def test_masks_are_drawn_with_the_published_shares(tokenizer, style):
    settings = Masking(stage(mlm_probability=0.3, masking=style), tokenizer)
    special = tokenizer.all_special_ids[0]
    ids = torch.arange(200_000) % len(tokenizer)
    masked_ids, labels = settings(ids, np.random.default_rng(0))
    chosen = labels != IGNORE_INDEX
    ordinary = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert not chosen[ids == special].any()
    assert torch.equal(masked_ids[~chosen], ids[~chosen])
    assert torch.equal(labels[chosen], ids[chosen])
    # 5 standard deviations of a share of 200,000 draws are 0.005, of 60,000 are 0.008
    assert chosen[ordinary].float().mean() == pytest.approx(0.3, abs=0.006)
    became = (masked_ids[chosen] == settings.mask).float().mean()
    kept = (masked_ids[chosen] == ids[chosen]).float().mean()
    assert became == pytest.approx(0.8 if style == "bert" else 1.0, abs=0.009)
    assert kept == pytest.approx(0.1 if style == "bert" else 0.0, abs=0.009)


def test_random_tokens_are_among_the_models_embeddings(tokenizer):
    settings = Masking(stage(mlm_probability=1.0, mask_token="a"), tokenizer, rows=300)
    ids = torch.full((50_000,), 299)
    actual, _ = settings(ids, np.random.default_rng(0))
    assert len(actual.unique()) > 290 and actual.max() < 300


def test_masks_are_a_function_of_seed_epoch_and_row(tokenizer):
    chunks = torch.randint(len(tokenizer), (6, 32), generator=torch.Generator().manual_seed(0))
    settings = Masking(stage(), tokenizer)

    def drawn(seed, epoch, row):
        return Chunks(chunks, settings, seed)[epoch, row]["labels"] == IGNORE_INDEX

    chunks[:] = chunks[0]
    assert torch.equal(drawn(1, 2, 3), drawn(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(drawn(1, 2, 3), drawn(*other))


def test_every_epoch_has_every_row_once_in_an_order_of_its_own():
    places = Places(50, seed=7)
    first = list(places)
    places.set_epoch(1)
    second = list(places)
    assert sorted(first) == [(0, row) for row in range(50)]
    assert sorted(second) == [(1, row) for row in range(50)]
    assert [row for _, row in first] != [row for _, row in second]


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3", "gemma2"])
def test_the_loss_is_that_of_the_position_before_and_softcaps_are_kept(
    tokenizer, tmp_path, family, monkeypatch
):
    keys = {"final_logit_softcapping": 2.0} if family == "gemma2" else {}
    model = random_model(family, vocab_size=len(tokenizer), **keys)
    model.config.is_causal = False
    start = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    real = masked.MntpTrainer.compute_loss

    def compute_loss(self, model, inputs, **keys):
        loss = real(self, model, inputs, **keys)
        seen.append((inputs, loss.detach().clone()))
        return loss

    monkeypatch.setattr(masked.MntpTrainer, "compute_loss", compute_loss)
    settings = stage(max_steps=1, lora=None)
    masked.train_stage(
        model, tokenizer, settings, chunked(settings, tokenizer), StageRun(tmp_path, 0)
    )
    [(inputs, loss)] = seen
    model.load_state_dict(start)
    logits = model(input_ids=inputs["input_ids"]).logits
    losses = [
        cross_entropy(logits[row, place - 1], inputs["labels"][row, place])
        for row, place in (inputs["labels"] != IGNORE_INDEX).nonzero().tolist()
        if place > 0
    ]
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_texts_fill_chunks_end_to_end(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The cat slept.\n\nThe dog saw a small horse.\nA bird.\n")
    whole = tokenizer("The cat slept.\nThe dog saw a small horse.\nA bird.\n")["input_ids"]
    actual = chunked(stage(dataset=str(path), max_tokens=4), tokenizer)
    assert actual.flatten().tolist() == whole[: len(whole) // 4 * 4]
    with pytest.raises(UserError, match=r"text.txt: \d+ tokens; expected one chunk of .*=512"):
        chunked(stage(dataset=str(path), max_tokens=512), tokenizer)
    path.write_text("\n")
    with pytest.raises(UserError, match="0 tokens"):
        chunked(stage(dataset=str(path)), tokenizer)


def test_a_mask_token_of_several_tokens_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"mask_token: 'a mask' is \d tokens .* expected one"):
        Masking(stage(mask_token="a mask"), tokenizer)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tokenizer, tmp_path, dying, lora):
    # 20 rows in batches of 4: the run is killed in its second epoch
    settings = stage(max_steps=10, save_steps=3, lora=lora, max_rows=100, learning_rate=1e-3)
    chunks = chunked(settings, tokenizer)[:20]
    assert len(chunks) == 20

    def train(directory, resume=False):
        model = random_model("qwen2", vocab_size=len(tokenizer))
        masked.train_stage(model, tokenizer, settings, chunks, StageRun(directory, 0, resume))
        return model

    whole = train(tmp_path / "whole")
    start = random_model("qwen2", vocab_size=len(tokenizer)).state_dict()
    targets = {*named_by(whole, "ffn"), *named_by(whole, "attention")}
    if lora:
        targets = {name for name in targets if not name.endswith("bias")}
    for name, value in whole.state_dict().items():
        assert torch.equal(value, start[name]) == (name not in targets), name
    steps = dying(masked.MntpTrainer, 9)
    with pytest.raises(KilledError):
        train(tmp_path / "half")
    resumed = train(tmp_path / "half", resume=True)
    assert len(steps) == 9 + 4
    for (name, value), (_, other) in zip(
        whole.state_dict().items(), resumed.state_dict().items(), strict=True
    ):
        assert torch.equal(value, other), name


@pytest.mark.slow
def test_the_objective_is_learned_and_the_tokenizer_knows_of_no_mask(
    tokenizer, tiny_path, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.config.is_causal = False
    before = tokenizer.special_tokens_map
    settings = stage(max_steps=30, lora=None, learning_rate=1e-3, per_device_train_batch_size=16)
    chunks = chunked(settings, tokenizer)
    report = masked.train_stage(model, tokenizer, settings, chunks, StageRun(tmp_path, 0))
    losses = [row["loss"] for row in report["log"] if "loss" in row]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5]), losses
    assert tokenizer.special_tokens_map == before and tokenizer.mask_token is None
