"""A word's vector is the mean of its own sub-words' states, whatever else is in its batch."""

import numpy as np
import pytest
import torch
from builders import random_model
from transformers import AutoTokenizer

from ubmoe.config import UserError
from ubmoe.probing.items import text, tokens
from ubmoe.probing.word_vectors import Sentences, Word, word_vectors

TALES = [
    "The cook burned the pie near the hill.",
    "I don't think that naïve 猫猫 sleeps, don't you?",
    "the dog the dog the dog",
    "A word",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


@pytest.fixture(scope="module", params=["qwen2", "llama", "mistral", "qwen3"])
def model(tokenizer, request):
    return random_model(request.param, vocab_size=len(tokenizer))


def all_words():
    return [word for tale in TALES for word in tokens(tale)]


def extracted(model, tokenizer, folder, words, budget=10_000, layers=(0, 1, 2), key="k"):
    sentences = Sentences(words, tokenizer, 512)
    return word_vectors(model, sentences, folder / "v.npy", layers, budget, key)


def test_words_own_the_tokens_that_spell_them(tokenizer):
    words = all_words()
    sentences = Sentences(words, tokenizer, 512)
    for word, place in zip(words, sentences.places, strict=True):
        assert tokenizer.decode([sentences.ids[place.row][t] for t in place.same]).strip() == text(
            word
        )
        first = place.same[0]
        assert place.previous == ([t - 1 for t in place.same] if first else place.same)
    dogs = [p for w, p in zip(words, sentences.places, strict=True) if text(w) == "dog"]
    assert len({place.same[0] for place in dogs}) == 3


def test_a_part_of_a_word_and_one_character_of_several_tokens_are_found(tokenizer):
    sentence = TALES[1]
    [contraction] = Sentences([Word(sentence, 2, 7)], tokenizer, 99).places
    start = sentence.index("猫")
    [first, second] = Sentences(
        [Word(sentence, start, start + 1), Word(sentence, start + 1, start + 2)], tokenizer, 99
    ).places
    ids = tokenizer(sentence)["input_ids"]
    assert tokenizer.decode([ids[t] for t in contraction.same]).strip() == "don't"
    assert tokenizer.decode([ids[t] for t in first.same]).strip() == "猫"
    assert tokenizer.decode([ids[t] for t in second.same]) == "猫" and first != second


def test_vectors_are_the_means_of_each_sentence_read_alone(model, tokenizer, tmp_path):
    words = all_words()
    for number, budget in enumerate((1, 25, 10_000)):
        actual = extracted(model, tokenizer, tmp_path / str(number), words, budget)
        for row, word in enumerate(words):
            encoded = tokenizer(word.sentence, return_offsets_mapping=True)
            ids = torch.tensor([encoded["input_ids"]])
            with torch.no_grad():
                states = model.model(ids, output_hidden_states=True).hidden_states
            own = [
                n
                for n, (a, b) in enumerate(encoded["offset_mapping"])
                if any(word.start <= place < word.end for place in range(a, b))
            ]
            before = [max(0, n - 1) for n in own] if own[0] else own
            for layer in range(3):
                for position, tokens_ in enumerate((own, before)):
                    expected = states[layer][0, tokens_].mean(0).numpy()
                    np.testing.assert_allclose(actual[row, position, layer], expected, atol=1e-4)


def test_a_causal_model_knows_nothing_of_what_follows(model, tokenizer, tmp_path):
    pair = ["the dog chased the cat", "the dog owned a stone"]
    words = [tokens(sentence)[1] for sentence in pair]
    causal = extracted(model, tokenizer, tmp_path / "causal", words)
    np.testing.assert_array_equal(causal[0], causal[1])
    model.config.is_causal = False
    both = extracted(model, tokenizer, tmp_path / "both", words)
    model.config.is_causal = True
    assert np.abs(both[0, 0, 1] - both[1, 0, 1]).max() > 1e-3


def test_a_file_of_the_same_words_and_model_is_reused_and_no_other(model, tokenizer, tmp_path):
    words = all_words()
    first = np.array(extracted(model, tokenizer, tmp_path, words))
    other = random_model("qwen2", vocab_size=len(tokenizer))
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
    np.testing.assert_array_equal(extracted(other, tokenizer, tmp_path, words), first)
    assert np.abs(extracted(other, tokenizer, tmp_path, words, key="other") - first).max() > 0.1
    assert len(extracted(other, tokenizer, tmp_path, words[:3], key="other")) == 3


def test_half_a_file_of_vectors_or_half_its_seal_is_made_anew(tokenizer, tmp_path):
    model = random_model("qwen2", vocab_size=len(tokenizer))
    whole = np.array(extracted(model, tokenizer, tmp_path, all_words()))
    for name in ("v.npy", "v.npz"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-9])
        np.testing.assert_array_equal(extracted(model, tokenizer, tmp_path, all_words()), whole)


def test_words_behind_the_cut_have_no_vector(model, tokenizer, tmp_path):
    words = tokens(TALES[0])
    sentences = Sentences(words, tokenizer, 4)
    there = [place is not None for place in sentences.places]
    assert there[0] and not there[-1]
    actual = word_vectors(model, sentences, tmp_path / "v.npy", [1], 100, "k")
    assert [not np.isnan(vector).any() for vector in actual] == there


def test_a_span_without_a_token_is_refused(tokenizer):
    with pytest.raises(UserError, match="no token of 'A word' lies at 6-7"):
        Sentences([Word("A word", 6, 7)], tokenizer, 9)
