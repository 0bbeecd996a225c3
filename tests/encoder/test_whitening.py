"""The map against hand-made vectors and scikit-learn, and what is saved against what was scored."""

import numpy as np
import pytest
import torch
from builders import random_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sklearn.decomposition import PCA
from transformers import AutoTokenizer

from ubmoe.config import BiSection, Config, UserError, WhitenSection
from ubmoe.encoder import whitening
from ubmoe.encoder.sentence_encoder import as_encoder, load_saved, save_encoder
from ubmoe.evaluate.sts import sts_scores, sts_task
from ubmoe.tiny import language

SENTENCES = language.sentences(60, seed=4)


@pytest.fixture
def vectors():
    """80 of 5 numbers, far from 0 and of unlike variances."""
    drawn = np.random.default_rng(0).standard_normal((80, 5))
    return drawn @ np.diag([9.0, 4, 2, 1, 0.5]) + [30, -20, 10, 0, 5]


def test_the_first_components_are_removed(vectors):
    weight, bias, share = whitening.fitted(vectors, 2)
    components = PCA(2).fit(vectors)
    expected = vectors - components.inverse_transform(components.transform(vectors))
    np.testing.assert_allclose(vectors @ weight.T + bias, expected, atol=1e-9)
    assert share == pytest.approx(100 * components.explained_variance_ratio_.sum())
    weight, bias, share = whitening.fitted(vectors, 0)
    np.testing.assert_allclose(vectors @ weight.T + bias, vectors - vectors.mean(0), atol=1e-9)
    assert share == 0


def test_whitened_vectors_have_one_variance_in_all_directions(vectors):
    weight, bias, _ = whitening.fitted(vectors, "whiten")
    actual = vectors @ weight.T + bias
    np.testing.assert_allclose(np.cov(actual.T, bias=True), np.eye(5), atol=1e-9)
    np.testing.assert_allclose(actual.mean(0), 0, atol=1e-9)
    components = PCA(whiten=True).fit_transform(vectors) * np.sqrt(80 / 79)
    np.testing.assert_allclose(actual @ actual.T, components @ components.T, atol=1e-9)


def test_vectors_that_vary_in_too_few_components_are_refused(vectors):
    flat = vectors @ np.diag([1, 1, 1, 1, 0])
    with pytest.raises(UserError, match="80 sentences vary in fewer than 5 components"):
        whitening.fitted(flat, "whiten")
    with pytest.raises(UserError, match="not finite"):
        whitening.fitted(flat + np.nan, 1)


@pytest.mark.parametrize(
    ("remove", "sentences", "said"),
    [
        (3, 3, "3 different sentences of x have fewer than 4 components; expected 4 at least"),
        ("whiten", 8, "8 different sentences of x have fewer than 9 components"),
        (8, 99, "bi.whiten.remove: 8 of 8 components; expected fewer, or whiten"),
    ],
)
def test_fewer_sentences_than_components_are_refused(remove, sentences, said):
    settings = WhitenSection(dataset="x", remove=remove)
    with pytest.raises(UserError, match=said):
        whitening.check(settings, sentences, 8)
    whitening.check(settings.model_copy(update={"remove": 2}), sentences, 8)
    whitening.check(None, 0, 8)


@pytest.mark.parametrize("remove", [1, "whiten"])
@pytest.mark.parametrize("form", ["eol", "echo"])
def test_what_is_saved_scores_what_was_scored(tiny_path, tmp_path, form, remove):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    model = random_model("llama", vocab_size=len(tokenizer))
    bi = BiSection(form=form, attention="causal", whiten=WhitenSection(remove=remove))
    encoder = as_encoder(model, tokenizer, bi)
    plain = encoder.encode(SENTENCES)
    whitening.whiten(encoder, Config(bi=bi), SENTENCES)
    actual = encoder.encode(SENTENCES)
    if remove == 1:
        components = PCA(1).fit(plain.astype(float))
        plain = plain - components.inverse_transform(components.transform(plain.astype(float)))
        np.testing.assert_allclose(actual, plain, atol=1e-4)
    else:
        np.testing.assert_allclose(np.cov(actual.T, bias=True), np.eye(32), atol=1e-2)
    save_encoder(encoder, model, tokenizer, bi, tmp_path / "bi")
    trusted = {"trust_remote_code": True} if form == "echo" else {}
    scored = sts_scores(encoder, [sts_task("tiny")], 32)
    assert not any(value.requires_grad for value in encoder[2].parameters())
    for again in (
        SentenceTransformer(str(tmp_path / "bi"), device="cpu", **trusted),
        load_saved(str(tmp_path / "bi"), "cpu"),
    ):
        assert type(again[2]) is Dense
        np.testing.assert_array_equal(again.encode(SENTENCES), actual)
    assert sts_scores(again, [sts_task("tiny")], 32)["tasks"] == scored["tasks"]
    assert "whitening" in (tmp_path / "bi" / "README.md").read_text()


def test_a_whitening_is_of_the_dtype_of_its_model(tiny_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    model = random_model("llama", vocab_size=len(tokenizer)).to(torch.bfloat16)
    bi = BiSection(form="plain", attention="causal", whiten=WhitenSection())
    encoder = as_encoder(model, tokenizer, bi)
    whitening.whiten(encoder, Config(bi=bi), SENTENCES)
    assert torch.isfinite(encoder.encode(SENTENCES, convert_to_tensor=True)).all()
