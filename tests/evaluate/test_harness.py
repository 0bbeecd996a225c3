"""lm-eval's model of ours: no text ends before its answer, and what is cut is counted."""

import logging
from types import SimpleNamespace

import pytest
from builders import metaspace_tokenizer, random_model, tuned
from lm_eval.models.huggingface import HFLM

from ubmoe.bitune.likelihoods import Likelihoods
from ubmoe.config import UserError
from ubmoe.data import tokens
from ubmoe.data.prompts import Example
from ubmoe.evaluate import generation
from ubmoe.evaluate.generation import warned_once
from ubmoe.evaluate.harness import SharedPrefixLM

PAIRS = [("a b? a", " cab"), ("a ", "bad"), ("gab a b c", " d")]


def instances(*pairs):
    return [
        SimpleNamespace(args=pair, task_name="some", doc_id=number)
        for number, pair in enumerate(pairs)
    ]


def asked(last=(), **keys):
    model = random_model("llama", vocab_size=len(metaspace_tokenizer()), **keys)
    return SharedPrefixLM(pretrained=model, tokenizer=metaspace_tokenizer(last=last), batch_size=2)


QUESTIONS = [
    (context, answer)
    for context in ("a b? a", "gab a b c d? cab", "a", "")
    for answer in (" cab", " bad a gab", " d")
]


@pytest.mark.parametrize("size", [1, 5, 64])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])  # gemma2: layers of two masks
@pytest.mark.parametrize("most", [64, 12])  # tokens of the context: 12 cuts prompts
def test_answers_score_as_the_library_reads_them_one_by_one(kind, size, most):
    keys = {"vocab_size": len(metaspace_tokenizer()), "max_position_embeddings": most}
    model = random_model(kind, **keys)
    requests = instances(*QUESTIONS, ("a b c d " * 4, " bad"))
    expected, actual = (
        lm(pretrained=model, tokenizer=metaspace_tokenizer(), batch_size=size).loglikelihood(
            requests, disable_tqdm=True
        )
        for lm in (HFLM, SharedPrefixLM)
    )
    for (own, greedy), (score, said) in zip(actual, expected, strict=True):
        assert own == pytest.approx(score, abs=1e-4) and greedy == said


def counted(lm, read):
    """The tokens of each forward of `lm`, in batches of four answers, go into `read`."""
    lm.batch_size_per_gpu = 4
    lm.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, given: read.append(given[0].numel())
    )


def test_a_prompt_is_read_once_for_all_its_answers():
    lm, read = asked(), []
    counted(lm, read)
    [context] = [lm.tok_encode("gab a b c d? cab")]
    answers = [lm.tok_encode(answer) for answer in ("cab", "bad", "gab")]
    assert len({len(answer) for answer in answers}) == 1
    lm._loglikelihood_tokens([(None, context, answer) for answer in answers], disable_tqdm=True)
    assert read == [len(context) - 1, 3 * (1 + len(answers[0]))]


def test_answers_of_like_length_are_read_together_and_both_answers_of_a_prompt():
    lm, read = asked(), []
    counted(lm, read)
    lengths = {(1, 2, 3): (1, 1), (4, 5): (9, 1), (6, 7, 8): (1, 1), (9, 10): (9, 9)}
    requests = [
        (None, list(context), [3] * item) for context, both in lengths.items() for item in both
    ]
    lm._loglikelihood_tokens(requests[::2] + requests[1::2], disable_tqdm=True)
    # prompts but for their last tokens, then answers after these: the long, and then the short
    assert read == [2 * 1, 4 * 10, 2 * 2, 4 * 2]


def test_a_tokenizer_that_ends_texts_scores_and_generates_as_if_it_did_not():
    with_end, without = asked(["</s>"]), asked()
    requests = instances(*PAIRS)
    scores = [lm.loglikelihood(requests, disable_tqdm=True) for lm in (with_end, without)]
    assert scores[0] == scores[1]
    keys = {"max_gen_toks": 4, "until": ["zzz"], "do_sample": False}
    requests = instances(*((context, keys) for context, _ in PAIRS))
    said = [lm.generate_until(requests, disable_tqdm=True) for lm in (with_end, without)]
    assert said[0] == said[1]


def test_prompts_longer_than_the_context_are_counted_by_task():
    lm = asked(max_position_embeddings=16)
    lm.loglikelihood(instances(("a" * 40, " b"), ("a", " b"), ("a" * 13, " b")), disable_tqdm=True)
    assert dict(lm.truncated) == {"some": 1}  # <s>, the mark, 13 and 2 are the context and one
    keys = {"max_gen_toks": 4, "until": ["zzz"], "do_sample": False}
    lm.generate_until(instances(("a" * 40, keys), ("a" * 10, keys)), disable_tqdm=True)
    assert dict(lm.truncated) == {"some": 2}
    with pytest.raises(UserError, match="some: document 0: its answer leaves no room"):
        lm.generate_until(instances(("a", keys | {"max_gen_toks": 16})), disable_tqdm=True)
    with pytest.raises(UserError, match="some: document 0: its answer leaves no room"):
        lm.loglikelihood(instances(("a", " b" * 30)), disable_tqdm=True)


def test_a_document_with_a_token_that_the_model_lacks_is_named():
    lm = asked()
    tokens.fit(lm.tokenizer, len(lm.tokenizer) - 1)
    with pytest.raises(UserError, match="some: document 1: holds the token"):
        lm.loglikelihood(instances(("a", "b"), ("a", " </s>")), disable_tqdm=True)


@pytest.mark.parametrize("last", [(), ("</s>",)])
def test_bitune_is_asked_with_the_tokens_that_it_is_trained_on(last):
    tokenizer = metaspace_tokenizer(last=last)
    lm = Likelihoods(tuned("lora", "llama", vocab_size=len(tokenizer)), tokenizer, 2)
    seen = []
    lm._scores = lambda examples: seen.extend(examples) or [(0.0, False)] * len(examples)
    lm.loglikelihood(instances(*PAIRS), disable_tqdm=True)
    expected = [Example(*tokens.split_ids(tokenizer, *pair)) for pair in PAIRS]
    assert sorted(map(str, seen)) == sorted(map(str, expected))


def test_a_librarys_warnings_are_said_once_whatever_their_numbers(monkeypatch):
    monkeypatch.setattr(generation, "WARNED", {})
    handler = logging.Handler()
    said = []
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        for length in (70, 71):  # a route each
            with warned_once("lm_eval"):
                logging.getLogger("lm_eval.models").warning("%d is too long", length)
                logging.getLogger("other").warning("kept")
    finally:
        logging.getLogger().removeHandler(handler)
    assert said == ["70 is too long", "kept", "kept"]
