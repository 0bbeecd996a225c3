"""A text is read twice, and its vector is of the second copy, whatever is cut or padded.

The tokenizer has a token for every letter, so that places are counted by hand: a first token, the
mark of a word's beginning, and then a token for each character of the template and the text.
"""

import json

import pytest
import torch
from builders import metaspace_tokenizer, random_model
from sentence_transformers import SentenceTransformer

from ubmoe.bidirectional import set_attention, set_layers
from ubmoe.config import ECHO, BiSection, StageSection, UserError
from ubmoe.encoder.contrastive_loss import CachedContrastiveLoss, ContrastiveLoss
from ubmoe.encoder.echo import POOLED, within
from ubmoe.encoder.sentence_encoder import as_encoder, lengths, load_saved, save_encoder

BEFORE, BETWEEN, _ = map(len, ECHO.split("{text}"))
OWN = 2  # <s>, and the mark of a word's beginning
TEXTS = ["a cab", "b", "fade a cage: deaf", "gg"]


def build(model=None, first=("<s>",), last=(), **keys):
    tokenizer = metaspace_tokenizer(list(first), list(last))
    model = model or random_model("gpt_neox", vocab_size=len(tokenizer))
    settings = BiSection(form="echo", **keys)
    return as_encoder(model, tokenizer, settings), model, tokenizer, settings


def second(text):
    """Where the second copy stands."""
    start = OWN + BEFORE + len(text) + BETWEEN
    return start, start + len(text)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last"])
def test_a_vector_is_of_the_second_copy(pooling, side):
    encoder, model, tokenizer, _ = build(pooling=pooling)
    encoder.tokenizer.padding_side = side
    expected = []
    for text in TEXTS:
        ids = tokenizer(ECHO.replace("{text}", text), return_tensors="pt")["input_ids"]
        start, end = second(text)
        assert ids.shape[1] == end
        with torch.no_grad():
            states = model.base_model(ids).last_hidden_state[0, start:end]
        places = torch.arange(1.0, len(text) + 1)[:, None]  # in the copy
        weights = {"mean": torch.ones_like(places), "weighted_mean": places}
        if pooling == "last":
            expected.append(states[-1])
        else:
            own = weights[pooling]
            expected.append((own * states).sum(0) / own.sum())
    actual = encoder.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(actual, torch.stack(expected), atol=1e-4, rtol=1e-4)
    alone = torch.cat([encoder.encode([text], convert_to_tensor=True) for text in TEXTS])
    torch.testing.assert_close(alone, actual, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("room", [2, 7])
def test_each_copy_is_cut_and_the_template_is_not(room):
    limit = OWN + BEFORE + BETWEEN + room + 1  # and the tokenizer's own last token
    encoder, _, tokenizer, _ = build(last=["</s>"], max_tokens=limit)
    text = "abcdefg"
    cut = ECHO.replace("{text}", text[: room // 2])
    features = encoder.preprocess([text, "a"])
    real = features["attention_mask"][0] > 0
    assert features["input_ids"][0, real].tolist() == tokenizer(cut)["input_ids"]
    place = OWN + BEFORE + room // 2 + BETWEEN
    places = features[POOLED][0].nonzero().flatten().tolist()
    assert places == list(range(place, place + room // 2))
    # what is too long is counted as in any other form
    assert lengths(encoder, [text, "a"]) == [limit - room + 2 * len(text), limit - room + 2]


def test_unlike_copies_are_cut_to_one_length():
    ids = list(range(20))
    actual, mask = within(ids, [range(2, 8), range(10, 17)], 12)  # 7 of the template
    assert actual == [0, 1, 2, 3, 8, 9, 10, 11, 17, 18, 19]
    assert [n for n, item in enumerate(mask) if item] == [6, 7]
    assert within(ids, [range(2, 8), range(10, 17)], 20)[0] == ids


@pytest.mark.parametrize("layers", ["none", "all", [1]])
def test_a_saved_encoder_reads_twice(tmp_path, layers):
    model = random_model("llama", vocab_size=len(metaspace_tokenizer()))
    set_attention(set_layers(model, layers if layers != "none" else "all"), layers != "none")
    attention = "causal" if layers == "none" else "bidirectional"
    encoder, _, tokenizer, settings = build(model, attention=attention, layers=layers)
    vectors = encoder.encode(TEXTS, convert_to_tensor=True)
    path = tmp_path / "bi"
    save_encoder(encoder, model, tokenizer, settings, path)
    kind = "LayeredEchoTransformer" if layers == [1] else "EchoTransformer"
    assert json.loads((path / "modules.json").read_text())[0]["type"].endswith(f".{kind}")
    with pytest.raises(ValueError, match="EchoTransformer"):
        SentenceTransformer(str(path), device="cpu")
    for saved in (
        SentenceTransformer(str(path), device="cpu", trust_remote_code=True),
        load_saved(str(path), "cpu"),
    ):
        actual = saved.encode(TEXTS, convert_to_tensor=True)
        torch.testing.assert_close(actual, vectors, atol=0, rtol=0)
    assert "read twice" in (path / "README.md").read_text()


def test_a_cached_loss_reads_what_the_plain_one_reads():
    encoder, model, _, _ = build()
    actual = []
    for kind in (ContrastiveLoss, CachedContrastiveLoss):
        columns = [dict(encoder.preprocess(texts)) for texts in (TEXTS, TEXTS[::-1])]
        loss = kind(encoder, "simcse", 0.1, 150)(columns)
        loss.backward()
        actual.append({name: p.grad.clone() for name, p in model.base_model.named_parameters()})
        model.zero_grad()
    mask = columns[0]["attention_mask"].clone()
    plain = encoder(columns[0])["sentence_embedding"]
    assert torch.equal(columns[0]["attention_mask"], mask)  # it may be read again
    torch.testing.assert_close(plain, encoder.encode(TEXTS, convert_to_tensor=True))
    for name, value in actual[0].items():
        torch.testing.assert_close(actual[1][name], value, atol=1e-4, rtol=1e-3)


def test_a_limit_without_room_for_both_copies_is_refused():
    least = OWN + BEFORE + BETWEEN + 2
    build(max_tokens=least)
    with pytest.raises(UserError, match=f"bi.max_tokens: {least - 1} leaves no room .* {least}"):
        build(max_tokens=least - 1)
    stages = [StageSection(objective="mntp", max_tokens=9), StageSection(max_tokens=9)]
    with pytest.raises(UserError, match="bi.stages.1.max_tokens: 9 leaves no room"):
        build(stages=stages)
