"""The encoder reads what it should, and its directory loads in stock libraries, either way."""

import copy
import json

import numpy as np
import pytest
import torch
from builders import metaspace_tokenizer, random_model, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from ubmoe import owned
from ubmoe.bidirectional import prove_attention
from ubmoe.config import FORMS, PROMPT, BiSection, ModelSection, UserError
from ubmoe.encoder.sentence_encoder import (
    alone_and_together,
    as_encoder,
    lengths,
    load_saved,
    own_prompt,
    rendered,
    save_encoder,
)

TEXTS = ["The cat slept.", "A much longer sentence about {braces} and 'quotes' in the garden."]


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


def build(tokenizer, tied=True, family="qwen2", **keys):
    model = random_model(family, vocab_size=len(tokenizer), tie_word_embeddings=tied)
    bi = BiSection(**keys)
    model.config.is_causal = bi.attention == "causal"
    return as_encoder(model, tokenizer, bi), model, bi


@pytest.mark.parametrize("prompt", [None, PROMPT, "{text}", 'Say "{text}" \\n {{x}} again'])
def test_a_text_stands_in_the_prompt_and_in_no_chat_template(tokenizer, prompt):
    encoder, _, _ = build(tokenizer, prompt=prompt)
    for text in TEXTS:
        expected = text if prompt is None else prompt.replace("{text}", text)
        assert rendered(encoder, text) == expected


def test_vectors_are_the_mean_or_the_last_of_the_last_states(tokenizer):
    for pooling in ("mean", "last"):
        encoder, model, _ = build(tokenizer, pooling=pooling, prompt="Say {text} now")
        ids = tokenizer("Say The cat slept. now", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model.model(ids).last_hidden_state[0]
        expected = states.mean(0) if pooling == "mean" else states[-1]
        actual = encoder.encode([TEXTS[0]], convert_to_tensor=True)[0]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("form", list(FORMS))
def test_a_form_reads_and_pools_as_it_says(tokenizer, tmp_path, form, attention):
    encoder, model, bi = build(tokenizer, form=form, attention=attention)
    expected = []
    for text in TEXTS:
        said = {"plain": text, "eol": f'This sentence : "{text}" means in one word:"'}
        said["paper"] = f'The representative word for sentence {text} is:"'
        said["echo"] = f"Sentence: {text}\nSentence again: {text}"
        ids = tokenizer(said[form], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model.model(ids, is_causal=attention == "causal").last_hidden_state[0]
        first = {"eol": -1}.get(form, 0)
        if form == "echo":
            first = len(tokenizer(said[form].removesuffix(f" {text}"))["input_ids"])
        expected.append(states[first:].mean(0))
    actual = encoder.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(actual, torch.stack(expected), atol=1e-5, rtol=1e-5)
    alone = [encoder.encode(text, convert_to_tensor=True) for text in TEXTS]
    torch.testing.assert_close(torch.stack(alone), actual, atol=1e-5, rtol=1e-5)
    save_encoder(encoder, model, tokenizer, bi, tmp_path / "bi")
    again = [load_saved(str(tmp_path / "bi"), "cpu")]
    if form != "echo":  # stock
        again.append(SentenceTransformer(str(tmp_path / "bi"), device="cpu"))
    for item in again:
        assert torch.equal(item.encode(TEXTS, convert_to_tensor=True), actual)


def test_a_prompt_stays_out_of_the_mean_in_every_way_to_the_vector(tokenizer, tmp_path):
    prompt = "Say this:\n{text}"
    encoder, model, bi = build(tokenizer, prompt=prompt, prompt_in_mean=False)
    alone = len(tokenizer("Say this:\n")["input_ids"])
    expected = []
    for text in TEXTS:
        ids = tokenizer(prompt.replace("{text}", text), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(model.model(ids).last_hidden_state[0, alone:].mean(0))
    expected = torch.stack(expected)
    assert rendered(encoder, TEXTS[0]) == prompt.replace("{text}", TEXTS[0])
    actual = encoder.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    save_encoder(encoder, model, tokenizer, bi, tmp_path / "bi")
    again = SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), actual, atol=0, rtol=0)


def with_ends(tokenizer, first="", last=""):
    """The same tokenizer, whose post-processor puts tokens around every text."""
    named = {item: tokenizer.convert_tokens_to_ids(item) for item in f"{first} {last}".split()}
    actual = copy.deepcopy(tokenizer)
    actual.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}".strip(), special_tokens=list(named.items())
    )
    return actual


@pytest.mark.parametrize("prompt", [None, PROMPT, "{text}", "a {text}", "a:{text} b"])
@pytest.mark.parametrize("ends", ["", "first", "last", "both"])
@pytest.mark.parametrize("kind", ["bytes", "metaspace", "metaspace once"])
def test_the_ids_are_those_of_the_text_in_its_prompt(tokenizer, tmp_path, prompt, ends, kind):
    first, last = ends in ("first", "both"), ends in ("last", "both")
    if kind == "bytes":
        actual = with_ends(tokenizer, "<|im_start|>" * first, "<|im_end|>" * last)
    else:
        actual = metaspace_tokenizer(
            ["<s>"] * first, ["</s>"] * last, once=kind == "metaspace once"
        )
    # by a qwen2's config.json the library takes any tokenizer for one of Qwen's
    family = "qwen2" if kind == "bytes" else "gpt_neox"
    encoder, model, bi = build(actual, family=family, prompt=prompt, max_tokens=50)
    save_encoder(encoder, model, actual, bi, tmp_path / "bi")
    saved = SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    for text in ("a cab", "b", " a ", "f" * 90):
        whole = actual((prompt or "{text}").replace("{text}", text))["input_ids"]
        for item in (encoder, saved):
            [ids] = item.preprocess([text], prompt=own_prompt(item))["input_ids"].tolist()
            assert ids == whole if len(whole) <= 50 else (len(ids), ids[-1]) == (50, whole[-1])


def test_a_prompt_stays_out_of_the_mean_beside_an_own_last_token(tokenizer):
    actual = with_ends(tokenizer, last="<|im_end|>")
    encoder, model, _ = build(actual, prompt="Say this:\n{text}", prompt_in_mean=False)
    ids = actual("Say this:\nThe cat slept.", return_tensors="pt")["input_ids"]
    assert ids[0, -1] == actual.eos_token_id
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[0]
    expected = states[len(tokenizer("Say this:\n")["input_ids"]) :].mean(0)
    vector = encoder.encode([TEXTS[0]], convert_to_tensor=True)[0]
    torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"would leave \d tokens out of the mean, and the prompt"):
        build(tokenizer, prompt="Say this<|im_end|>{text}", prompt_in_mean=False)
    twice = with_ends(tokenizer, last="<|im_end|> <|im_end|>")
    with pytest.raises(UserError, match=r"would leave 7 tokens out of the mean, and"):
        build(twice, prompt="Say this:\n{text}", prompt_in_mean=False)


def test_a_saved_encoder_pads_with_a_token_that_it_has(tokenizer, tmp_path):
    encoder, model, bi = build(tokenizer)
    expected = encoder.encode(TEXTS)
    grown = copy.deepcopy(tokenizer)
    grown.add_special_tokens({"pad_token": "[PAD]"})
    save_encoder(encoder, model, grown, bi, tmp_path / "bi")
    again = load_saved(str(tmp_path / "bi"), "cpu")
    np.testing.assert_allclose(again.encode(TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(as_encoder(model, grown, bi).encode(TEXTS), expected, atol=1e-6)
    with pytest.raises(UserError, match=r"row 2: holds the token '\[PAD\]'"):
        lengths(again, ["The cat.", "A [PAD]"])


def test_a_prompt_that_texts_melt_into_cannot_stay_out_of_the_mean(tokenizer):
    with pytest.raises(UserError, match="changes the tokens of the prompt; expected a prompt that"):
        build(tokenizer, prompt="The ca{text}", prompt_in_mean=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_stock_libraries_load_the_directory_as_either_model(tokenizer, tmp_path, tied, attention):
    encoder, model, bi = build(tokenizer, tied, attention=attention, max_tokens=77)
    vectors = encoder.encode(TEXTS)
    save_encoder(encoder, model, tokenizer, bi, tmp_path / "bi")
    again = SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    np.testing.assert_array_equal(again.encode(TEXTS), vectors)
    assert again.max_seq_length == 77
    assert rendered(again, "x") == PROMPT.replace("{text}", "x")
    prove_attention(again[0].model, bidirectional=attention == "bidirectional")
    prove_attention(AutoModel.from_pretrained(tmp_path / "bi"), attention == "bidirectional")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "bi", is_causal=True).eval()
    prove_attention(lm, bidirectional=False)
    torch.testing.assert_close(lm.lm_head.weight, model.lm_head.weight, atol=0, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "bi").model_max_length == 2048
    card = (tmp_path / "bi" / "README.md").read_text()
    assert ("is_causal=True" in card) == (attention == "bidirectional")
    modules = json.loads((tmp_path / "bi" / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)


def test_saving_again_replaces_the_whole_directory(tokenizer, tmp_path):
    encoder, model, bi = build(tokenizer)
    save_encoder(encoder, model, tokenizer, bi, tmp_path / "bi")
    (tmp_path / "bi" / "stale.safetensors").write_text("x")
    owned.name_all(tmp_path / "bi")
    save_encoder(encoder, model, tokenizer, bi, tmp_path / "bi")
    assert not (tmp_path / "bi" / "stale.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bi"]


@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_a_vector_does_not_depend_on_its_company_or_on_the_padding_side(tokenizer, text):
    encoder, _, _ = build(tokenizer)
    [alone] = encoder.encode([text])
    together = encoder.encode([text, *TEXTS])[0]
    encoder.tokenizer.padding_side = "left"
    left = encoder.encode([text, *TEXTS])[0]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(left, alone, atol=1e-5)


def test_a_model_without_a_padding_token_is_padded_all_the_same(tokenizer, tmp_path):
    expected, model, bi = build(tokenizer)
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    loaded = tokenizer_of(ModelSection(name=str(tmp_path)))
    encoder = as_encoder(model, loaded, bi)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected.encode(TEXTS), atol=1e-6)
    save_encoder(encoder, model, loaded, bi, tmp_path / "bi")
    again = SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), expected.encode(TEXTS), atol=1e-6)


def of_learned_positions(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return build(tokenizer, family="gpt2", prompt=None), tokenizer


def test_an_encoder_of_learned_positions_is_saved_with_padding_on_the_right(tokenizer, tmp_path):
    (encoder, model, bi), left = of_learned_positions(tokenizer)
    save_encoder(encoder, model, left, bi, tmp_path / "bi")
    assert left.padding_side == "left"  # the language model's own
    stock = SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    assert stock.tokenizer.padding_side == "right"
    alone = torch.cat([stock.encode([text], convert_to_tensor=True) for text in TEXTS])
    together = stock.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoder.encode(TEXTS, convert_to_tensor=True), together)


def test_a_strangers_encoder_is_padded_where_its_positions_want_it(tokenizer, tmp_path, caplog):
    (encoder, model, bi), left = of_learned_positions(tokenizer)
    save_encoder(encoder, model, left, bi, tmp_path / "bi")
    left.save_pretrained(tmp_path / "bi")
    stock = SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    assert alone_and_together(stock) > 0.1  # else there would be nothing to mend
    caplog.set_level("INFO")
    actual = load_saved(str(tmp_path / "bi"), "cpu")
    assert "padded on the right, as its positions require" in caplog.text
    expected = encoder.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(actual.encode(TEXTS, convert_to_tensor=True), expected)


def test_an_encoder_whose_vectors_depend_on_their_company_is_not_saved(tokenizer, tmp_path):
    encoder, model, bi = build(tokenizer, prompt=None)
    real = encoder[0].forward

    def blind(features, **keys):
        return real(features | {"attention_mask": torch.ones_like(features["attention_mask"])})

    encoder[0].forward = blind
    with pytest.raises(UserError, match="a short text's vector moves by .* when a longer text"):
        save_encoder(encoder, model, tokenizer, bi, tmp_path / "bi")
    assert not (tmp_path / "bi").exists()


def test_a_model_without_an_inner_one_is_no_encoder(tiny_path, monkeypatch):
    """As of Llama 4, whose class names its inner model otherwise than it is called."""
    tokenizer = tokenizer_of(ModelSection(device="cpu"))
    model = random_model("qwen2", vocab_size=len(tokenizer))
    monkeypatch.setattr(type(model), "base_model_prefix", "elsewhere")
    with pytest.raises(UserError, match="Qwen2ForCausalLM has no model without its head"):
        as_encoder(model, tokenizer, BiSection(prompt=None))
