"""lm-eval's requests to a Bitune model: the same numbers as one answer at a time."""

from types import SimpleNamespace

import pytest
import torch
from builders import random_model, tuned
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from ubmoe.bitune.likelihoods import Likelihoods
from ubmoe.bitune.model import attach
from ubmoe.config import BituneSection
from ubmoe.data.prompts import Example, batch
from ubmoe.tiny import tasks as tiny_tasks


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


def asked():
    """Requests with contexts of many lengths, each with several answers."""
    rows = [
        (row["question"], choice) for row in tiny_tasks.facts()[:6] for choice in row["choices"]
    ]
    rows += [("", "The dog sleeps.")]  # lm-eval puts one token in front
    return [SimpleNamespace(args=row) for row in rows]


@pytest.mark.parametrize("size", [1, 5, 64])
def test_likelihoods_are_those_of_one_answer_at_a_time(tokenizer, size):
    bitune = tuned(vocab_size=len(tokenizer))
    lm = Likelihoods(bitune, tokenizer, size)
    actual = lm.loglikelihood(asked(), disable_tqdm=True)
    for request, (score, greedy) in zip(asked(), actual, strict=True):
        context, answer = (
            lm._encode_pair(*request.args)
            if request.args[0]
            else (
                [lm.prefix_token_id],
                tokenizer(request.args[1])["input_ids"],
            )
        )
        with torch.no_grad():
            logits, tokens = bitune(**batch([Example(context, answer)]))
        logs = logits.log_softmax(-1)
        expected = logs[range(len(tokens)), tokens].sum().item()
        assert score == pytest.approx(expected, abs=1e-3)
        assert greedy == (logits.argmax(-1).tolist() == answer)


def test_fresh_causal_adapters_score_like_the_librarys_own_model(tokenizer):
    model = random_model("qwen2", vocab_size=len(tokenizer))
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(
        asked(), disable_tqdm=True
    )
    bitune = attach(model, BituneSection(variant="only_causal"), 0)
    actual = Likelihoods(bitune, tokenizer, 4).loglikelihood(asked(), disable_tqdm=True)
    for (own, greedy), (score, said) in zip(actual, expected, strict=True):
        assert own == pytest.approx(score, abs=1e-4) and greedy == said


def test_generated_answers_are_those_of_generate(tokenizer):
    bitune = tuned(vocab_size=len(tokenizer))
    prompts = ["Where does Anna live?", "The dog", "Who eats the red apple in the garden?"]
    keys = {"max_gen_toks": 6, "until": ["zzz"], "do_sample": False}
    requests = [SimpleNamespace(args=(prompt, keys)) for prompt in prompts]
    actual = Likelihoods(bitune, tokenizer, 2).generate_until(requests, disable_tqdm=True)
    for prompt, text in zip(prompts, actual, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        said = bitune.generate(
            ids, torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True) == text
