"""The embedded language: deterministic, distinct, graded, and wide enough to measure on."""

import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from builders import ROOT
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ubmoe.tiny import language
from ubmoe.tiny.language import ORDERS, Meaning, Noun

BUCKETS = ((0, 64), (64, 128), (128, 256), (256, 512))


@pytest.fixture(scope="module")
def tokenizer(tiny_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_path)


def python(code: str, **environment: str) -> str:
    """What a fresh Python prints."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | environment,
    ).stdout


def ranks(values: list[float]) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation x 100."""
    return 100 * float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def cosine(first: Counter, second: Counter) -> float:
    dot = sum(first[key] * second[key] for key in first)
    norms = [math.sqrt(sum(value**2 for value in bag.values())) for bag in (first, second)]
    return dot / math.prod(norms)


def content_words(sentence: str) -> set[str]:
    grammar = {"the", "was", "by", "in", "near", "behind", "at", "after"}
    return set(sentence.lower().replace(",", "").rstrip(".").split()) - grammar


def test_importing_the_language_loads_nothing_heavy() -> None:
    code = "import sys, ubmoe.tiny.language; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    assert python(code).strip() == "[]"


def test_every_list_is_a_function_of_count_and_seed_alone() -> None:
    code = (
        "from ubmoe.tiny import language as l; import hashlib; print(hashlib.sha256(repr("
        "[l.sentences(50, 3), l.pairs(50, 3), l.facts(), l.chats(50, 3)]).encode()).hexdigest())"
    )
    assert python(code, PYTHONHASHSEED="1") == python(code, PYTHONHASHSEED="2")
    for make in (language.sentences, language.pairs, language.chats):
        assert make(40, 1) == make(80, 1)[:40]
        assert make(40, 1) != make(40, 2)


def test_sentences_are_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(set(language.sentences(5000, 1))) == 5000
    monkeypatch.setattr(language, "_sentence", lambda _, rng: str(rng.randrange(60)))
    assert len(set(language.sentences(50, 1))) == 50  # though most draws repeat an earlier one


def test_every_content_word_names_one_concept_and_every_concept_has_two_words() -> None:
    concepts = (*language.NOUNS, *language.ADJECTIVES, *language.VERBS, *language.PLACES)
    concepts += language.TIMES
    words = Counter(word for concept in concepts for word in concept.words)
    assert all(len(concept.words) == 2 for concept in concepts)
    assert max(words.values()) == 1


def test_drawn_meanings_respect_the_selection_restrictions() -> None:
    words = {word: noun for noun in language.NOUNS for word in noun.words}
    verbs = {word: verb for verb in language.VERBS for word in verb.words}
    clauses = [
        chat["messages"][turn + 1]["content"].rstrip(".").split()
        for chat in language.chats(300, 4)
        for turn, message in enumerate(chat["messages"])
        if message["role"] == "user" and message["content"].endswith("?")
    ]
    checked = 0
    for clause in clauses:
        if len(clause) >= 5 and clause[0] == "The" and clause[2] in verbs and clause[4] in words:
            verb = verbs[clause[2]]
            assert words[clause[1]].kind in verb.agents, clause
            assert words[clause[4]].kind in verb.patients, clause
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("role", ["agents", "patients"])
def test_verbs_differ_in_the_animacy_of_both_roles(role: str) -> None:
    animate = [
        Noun(("x", "y"), kind).animate for verb in language.VERBS for kind in getattr(verb, role)
    ]
    assert 0.2 < sum(animate) / len(animate) < 0.9


def test_verbs_are_dynamic_and_stative_causative_and_not() -> None:
    kinds = Counter((verb.dynamic, verb.causative) for verb in language.VERBS)
    assert sorted(kinds) == [(False, False), (True, False), (True, True)]
    assert min(kinds.values()) >= 5


def test_pairs_have_every_level_and_bags_of_tokens_order_them_only_in_part(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    pairs = language.pairs(1000, 11)
    levels = Counter(pair.score for pair in pairs)
    assert sorted(levels) == [half / 2 for half in range(11)]
    assert min(levels.values()) >= 20
    bags = [[Counter(tokenizer(text).input_ids) for text in pair[1:]] for pair in pairs]
    correlation = spearman([cosine(*bag) for bag in bags], [pair.score for pair in pairs])
    assert 20 < correlation < 80, correlation


def test_a_full_score_needs_no_common_words() -> None:
    full = [pair for pair in language.pairs(1000, 11) if pair.score == 5]
    shared = [
        len(content_words(pair.sentence1) & content_words(pair.sentence2))
        / len(content_words(pair.sentence1) | content_words(pair.sentence2))
        for pair in full
    ]
    assert min(shared) < 0.1


def test_words_and_order_keep_the_score_and_swapped_roles_lose_it() -> None:
    meaning = next(pair for pair in map(meaning_of, range(100)) if swappable(pair))
    swapped = meaning._replace(
        agent=meaning.patient,
        agent_adjective=meaning.patient_adjective,
        patient=meaning.agent,
        patient_adjective=meaning.agent_adjective,
    )
    texts = {
        language.express(meaning, order, (choice,) * 7) for order in ORDERS for choice in (0, 1)
    }
    assert len(texts) == 2 * len(ORDERS)
    assert language.score(meaning, meaning) == 5
    assert language.score(meaning, swapped) == 2  # verb 2, place 1, time 1 of 10 are left
    same_words = [
        content_words(language.express(one, ORDERS[0], (0,) * 7)) for one in (meaning, swapped)
    ]
    assert same_words[0] == same_words[1]


def meaning_of(seed: int) -> Meaning:
    return language.draw(random.Random(seed))


def swappable(meaning: Meaning) -> bool:
    swapped = meaning._replace(agent=meaning.patient, patient=meaning.agent)
    return language.allowed(swapped) and meaning.agent_adjective != meaning.patient_adjective


def concepts(sentence: str) -> list[str]:
    """The first word of every noun, adjective and verb concept in the sentence, sorted."""
    lexicon = (*language.NOUNS, *language.ADJECTIVES, *language.VERBS)
    first = {word: concept.words[0] for concept in lexicon for word in concept.words}
    words = sentence.lower().replace(",", "").rstrip(".").split()
    return sorted(first[word] for word in words if word in first)


def test_some_pairs_differ_only_in_who_does_it_to_whom() -> None:
    same_company = [
        pair
        for pair in language.pairs(1000, 11)
        if concepts(pair.sentence1) == concepts(pair.sentence2) and pair.score < 3.5
    ]
    assert len(same_company) >= 20
    # two nouns of weight 2 change places, and mostly their two adjectives of weight 1
    assert {pair.score for pair in same_company} <= {2.0, 3.0}


def test_the_world_has_forty_facts_with_one_answer_each() -> None:
    world = language.facts()
    assert len(world) >= 40
    assert len({fact.question for fact in world}) == len(world)
    assert world == language.facts()


def test_chats_alternate_and_are_of_every_kind() -> None:
    chats = language.chats(300, 8)
    questions = [chat["messages"][0]["content"] for chat in chats]
    for chat in chats:
        roles = [message["role"] for message in chat["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    for beginning in (
        "Where does",
        "Say it another way",
        "What is another word",
        "Tell me a story",
        "What day",
        "Tell me about",
    ):
        assert any(question.startswith(beginning) for question in questions), beginning
    assert any(question.split(". ")[-1].startswith("Who ") for question in questions)
    assert any(len(chat["messages"]) > 6 for chat in chats)


def test_chat_lengths_fill_every_bucket_and_fit_in_512_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    lengths = [
        len(tokenizer.apply_chat_template(chat["messages"], return_dict=False))
        for chat in language.chats(1000, 9)
    ]
    shares = [sum(low < n <= high for n in lengths) / len(lengths) for low, high in BUCKETS]
    assert max(lengths) <= 512
    assert min(lengths) < 32
    assert min(shares) > 0.1, shares
