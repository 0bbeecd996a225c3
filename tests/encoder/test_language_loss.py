"""The language-model loss beside a contrastive stage is the library's own, and keeps generation."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe.bidirectional import set_attention
from ubmoe.config import BiSection, StageSection, UserError
from ubmoe.data.chats import collate, read_chats
from ubmoe.encoder.contrastive import read_dataset, train_stage
from ubmoe.encoder.language_loss import LanguageLoss, read_language
from ubmoe.encoder.sentence_encoder import as_encoder
from ubmoe.evaluate.generation import perplexity
from ubmoe.training.checkpoints import StageRun

KEYS = {"max_rows": 400, "max_tokens": 32, "learning_rate": 2e-3, "lm_max_tokens": 64}


@pytest.fixture
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


def test_it_is_the_librarys_loss_of_the_answers_read_causally(tiny_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_path).eval()
    stage = StageSection(lm_weight=1.0, lm_max_rows=20, lm_batch_size=5)
    chats = read_language(stage, tokenizer)
    assert len(chats) == 20
    everything = LanguageLoss(model, chats, rows=20, seed=3)
    set_attention(model, bidirectional=True)
    actual = everything(step=0)
    assert model.config.is_causal is False  # the encoder's mask is back
    set_attention(model, bidirectional=False)
    batch = collate(chats)
    with torch.no_grad():
        expected = model(**batch).loss
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    few = LanguageLoss(model, chats, rows=5, seed=3)
    assert few(step=1).item() == few(step=1).item() != few(step=2).item()


def test_texts_count_whole(tokenizer, tmp_path):
    (tmp_path / "lines.txt").write_text("The dog sleeps.\nAnna eats bread.\n")
    stage = StageSection(lm_weight=1.0, lm_dataset=f"{tmp_path}/lines.txt", lm_batch_size=2)
    chats = read_language(stage, tokenizer)
    assert [chat.ids for chat in chats] == [
        tokenizer(text)["input_ids"] for text in ("The dog sleeps.", "Anna eats bread.")
    ]
    assert all(all(chat.answer) for chat in chats)
    with pytest.raises(UserError, match="2 rows; expected bi.stages.N.lm_batch_size=3 at least"):
        read_language(stage.model_copy(update={"lm_batch_size": 3}), tokenizer)
    assert read_language(StageSection(), tokenizer) == []


@pytest.mark.parametrize("keys", [{"objective": "mntp"}, {"activation_checkpointing": True}])
def test_it_stands_beside_contrast_alone(keys):
    with pytest.raises(ValueError, match="lm_weight stands beside simcse or supervised"):
        StageSection(lm_weight=1.0, **keys)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_generation_is_kept_where_it_is_on(tiny_path, tokenizer, tmp_path, cached):
    lost = {}
    kept = read_chats("tiny", tokenizer, 64, 40).chats
    for weight in (0.0, 1.0):
        model = AutoModelForCausalLM.from_pretrained(tiny_path)
        set_attention(model, bidirectional=True)
        encoder = as_encoder(model, tokenizer, BiSection(prompt=None))
        more = {"lm_weight": weight, "lm_batch_size": 8, "max_steps": 12, "cached": cached}
        stage = StageSection(per_device_train_batch_size=16, **KEYS, **more)
        language = read_language(stage, tokenizer)
        work = StageRun(tmp_path / str(weight), 0)
        report = train_stage(
            encoder, model, stage, read_dataset(stage, tokenizer)[0], work, language
        )
        log = [row for row in report["log"] if "loss" in row]
        assert ("lm_loss" in log[0]) == bool(weight)
        set_attention(model, bidirectional=False)
        lost[weight] = perplexity(model, kept)["perplexity"]
    assert lost[1.0] < lost[0.0] - 0.1, lost
