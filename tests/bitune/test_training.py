"""Adapters and theta learn answers, resume to the same weights, and are scored on each answer."""

import math

import pytest
import torch
from builders import EXAMPLES, KilledError, random_model, tuned
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe.bitune import training as instruct
from ubmoe.bitune.examples import read_examples
from ubmoe.bitune.model import attach
from ubmoe.config import BituneSection, UserError, load_config
from ubmoe.data.prompts import Example
from ubmoe.training.checkpoints import StageRun


def settings(**keys):
    common = {"per_device_train_batch_size": 4, "logging_steps": 1, "warmup_steps": 0}
    return BituneSection(**common | keys)


def some_examples(count):
    generator = torch.Generator().manual_seed(2)
    rows = []
    for _ in range(count):
        p, a = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(2))
        ids = torch.randint(1, 97, (p + a,), generator=generator).tolist()
        rows.append(Example(ids[:p], ids[p:]))
    return rows


@pytest.mark.slow
def test_the_embedded_model_learns_a_new_answer(tiny_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    chats = read_examples("tiny", tokenizer, None, 512, 40).chats
    examples = [item for chat in chats for item in chat]
    new = [
        Example(example.prompt, examples[0].answer) for example in examples
    ]  # always the same one
    keys = settings(max_steps=25, learning_rate=3e-3)
    bitune = attach(model, keys, 0)
    frozen = {n: v.clone() for n, v in bitune.named_parameters() if not v.requires_grad}
    before = instruct.perplexity(bitune, new)["perplexity"]
    log = instruct.train(bitune, keys, new, StageRun(tmp_path, 0))
    assert instruct.perplexity(bitune, new)["perplexity"] < 0.6 * before
    rows = [row for row in log if "loss" in row]
    assert rows[0]["alpha_keys"] == pytest.approx([0.5] * 4, abs=0.1) != rows[-1]["alpha_keys"]
    for name, value in bitune.named_parameters():
        assert name not in frozen or torch.equal(value, frozen[name]), name


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, dying):
    examples = some_examples(40)  # in batches of 4: step 11 is of the second epoch

    def train(directory, resume=False):
        keys = settings(max_steps=14, save_steps=3, num_train_epochs=2)
        bitune = attach(random_model("qwen2"), keys, 5)
        instruct.train(bitune, keys, examples, StageRun(directory, 5, resume))
        return torch.cat([value.detach().flatten() for value in bitune.parameters()])

    whole = train(tmp_path / "whole")
    steps = dying(instruct.BituneTrainer, 14)
    with pytest.raises(KilledError):
        train(tmp_path / "half")
    assert torch.equal(train(tmp_path / "half", resume=True), whole)
    assert len(steps) == 14 + 2


def test_a_batch_has_like_lengths_and_every_epoch_its_own_order():
    lengths = list(range(1, 1001))
    sampler = instruct.LikeLengths(lengths, 10, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(1000)) and first == list(sampler)
    batches = [[lengths[row] for row in first[k : k + 10]] for k in range(0, 1000, 10)]
    assert max(max(batch) - min(batch) for batch in batches) < 150  # of 999
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_perplexity_is_that_of_each_answer_token_alone(monkeypatch):
    bitune, lost = tuned(), [0.0] * len(EXAMPLES)
    for number, example in enumerate(EXAMPLES):
        for place, token in enumerate(example.answer):
            with torch.no_grad():
                one = Example(example.prompt, [*example.answer[:place], token])
                logits, _ = bitune(**instruct.batch([one]))
            lost[number] -= logits[-1].log_softmax(-1)[token].item()
    tokens = [len(example.answer) for example in EXAMPLES]
    for budget in (1, 20, 10_000):
        monkeypatch.setattr("ubmoe.evaluate.generation.BATCH_TOKENS", budget)
        actual = instruct.perplexity(bitune, EXAMPLES)
        assert actual["perplexity"] == pytest.approx(math.exp(sum(lost) / sum(tokens)), rel=1e-4)
        assert actual["answers"]["losses"] == pytest.approx(lost, abs=1e-3)
        assert actual["answers"]["tokens"] == tokens


def test_what_bitune_cannot_do_is_refused():
    with pytest.raises(UserError, match="drops the caches that Bitune mixes"):
        load_config(None, ["bitune.activation_checkpointing=true"])
    with pytest.raises(UserError, match="expected {prompt} once"):
        load_config(None, ["bitune.template=no place"])
