"""Only the routers learn, on the assistant's tokens, and they learn to prefer the better expert."""

import pytest
import torch
from builders import KilledError, drawn, join, pair, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe.config import BiSection, LoraSection, MoeSection, UserError, load_config
from ubmoe.data.chats import Chat, collate, read_chats
from ubmoe.data.padding import IGNORE_INDEX
from ubmoe.encoder.sentence_encoder import as_encoder
from ubmoe.models import lora
from ubmoe.moe import router_training, routers
from ubmoe.moe.distillation import Distillation
from ubmoe.training.checkpoints import StageRun
from ubmoe.training.losses import mean_loss, predictions


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


@pytest.fixture(scope="module")
def chats(tokenizer):
    return read_chats("tiny", tokenizer, 128, 40).chats


def settings(**keys):
    common = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1}
    return MoeSection(**common | keys)


def test_a_batch_is_padded_right_and_only_answers_are_labelled():
    chats = [
        Chat("a", [5, 6, 7], [False, True, True], ["prompt", "answer", "template"]),
        Chat("b", [8], [True], ["answer"]),
    ]
    batch = {name: value.tolist() for name, value in collate(chats).items()}
    assert batch["input_ids"] == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"] == [[IGNORE_INDEX, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "qwen2_moe"])
def test_the_loss_is_the_librarys_own(chats, family):
    model = random_model(family, vocab_size=1000)
    batch = collate(chats[:3])
    labels = batch.pop("labels")
    actual = mean_loss(*predictions(model, model.get_output_embeddings(), batch, labels))
    expected = model(**batch, labels=labels).loss
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    none = torch.full_like(labels, IGNORE_INDEX)
    assert mean_loss(*predictions(model, model.get_output_embeddings(), batch, none)) == 0


@pytest.mark.parametrize("keys", [{}, {"top_k": 1, "router_init": "uni"}])
def test_every_router_moves_in_float32_and_nothing_else_does(chats, tmp_path, keys):
    uni, bi = pair(vocab_size=1000)
    model = drawn(join(uni, bi, keys.get("top_k", 2)), scale=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    log = router_training.train(model, settings(**keys), chats, StageRun(tmp_path, 0))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in routers.router_weights(model)), name
    assert {value.dtype for value in routers.router_weights(model).values()} == {torch.float32}
    row = log[0]
    assert 0 < row["bi_weight"] < 1 and 0 < row["router_entropy"] <= 0.6932
    assert len(row["bi_weight_by_layer"]) == 2


def test_a_bfloat16_mixture_trains_its_float32_routers_under_autocast(chats, tmp_path):
    uni, bi = (model.bfloat16() for model in pair(vocab_size=1000))
    model = drawn(join(uni, bi), scale=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    router_training.train(model, settings(bf16=True), chats, StageRun(tmp_path, 0))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in routers.router_weights(model)), name
        assert value.dtype == (
            torch.float32 if name in routers.router_weights(model) else torch.bfloat16
        )


def test_routers_learn_to_prefer_the_better_expert(tiny_path, chats, tmp_path):
    uni = AutoModelForCausalLM.from_pretrained(tiny_path)
    bi = AutoModelForCausalLM.from_pretrained(tiny_path)
    with torch.no_grad():
        for name, value in bi.named_parameters():
            if ".mlp.down_proj" in name:
                value.copy_(value.flip(0))  # an FFN of the right size that says the wrong things
    model = join(uni, bi)
    log = router_training.train(
        model, settings(max_steps=25, learning_rate=0.01), chats, StageRun(tmp_path, 0)
    )
    rows = [row for row in log if "loss" in row]
    assert rows[0]["bi_weight"] == pytest.approx(0.5, abs=1e-5)
    assert rows[-1]["bi_weight"] < 0.3 and rows[-1]["loss"] < rows[0]["loss"] / 2


def test_a_killed_run_goes_on_to_the_same_routers(chats, tmp_path, dying):

    def train(directory, resume=False):
        model = join(*pair(vocab_size=1000))
        keys = {"max_steps": 14, "save_steps": 3}  # 40 chats in batches of 4: the second epoch
        router_training.train(model, settings(**keys), chats, StageRun(directory, 0, resume))
        return torch.stack([value.detach() for value in routers.router_weights(model).values()])

    whole = train(tmp_path / "whole")
    steps = dying(router_training.RouterTrainer, 14)
    with pytest.raises(KilledError):
        train(tmp_path / "half")
    assert torch.equal(train(tmp_path / "half", resume=True), whole)
    assert len(steps) == 14 + 2


def test_a_run_that_is_over_is_only_loaded_and_another_encoders_routers_are_not(chats, tmp_path):
    def train(model, resume, **keys):
        keys = settings(lr_scheduler_type="constant", **keys)
        log = router_training.train(model, keys, chats, StageRun(tmp_path, 0, resume))
        return torch.stack([v.detach() for v in routers.router_weights(model).values()]), log

    first, log = train(join(*pair(vocab_size=1000)), False)
    again, read = train(join(*pair(vocab_size=1000)), True, route="half", logging_steps=3)
    assert torch.equal(first, again) and read == log[:-1]  # but for the time it took
    uni, bi = pair(vocab_size=1000)
    with torch.no_grad():
        bi.model.layers[0].mlp.up_proj.weight.mul_(2)
    other, _ = train(join(uni, bi), True)
    assert not torch.equal(first, other)
    fresh = join(uni, bi)
    router_training.train(
        fresh, settings(lr_scheduler_type="constant"), chats, StageRun(tmp_path / "x", 0)
    )
    assert torch.equal(
        other, torch.stack([v.detach() for v in routers.router_weights(fresh).values()])
    )


def test_fewer_chats_than_a_batch_and_weights_that_explode_are_refused(chats, tmp_path):
    model = join(*pair(vocab_size=1000))
    with pytest.raises(UserError, match="3 rows to train on, and a step takes 4"):
        router_training.train(model, settings(), chats[:3], StageRun(tmp_path, 0))
    keys = settings(max_steps=1).model_copy(update={"learning_rate": 1e39})
    with pytest.raises(UserError, match="lower learning_rate"):
        router_training.train(model, keys, chats, StageRun(tmp_path, 0))


def test_the_load_balancing_loss_is_added_at_top_k_1(chats, tmp_path):
    values = {}
    for coefficient in (0.0, 1.0):
        model = drawn(join(*pair(vocab_size=1000), 1), scale=0.5)
        keys = {"top_k": 1, "router_init": "uni", "router_aux_loss_coef": coefficient}
        work = StageRun(tmp_path / str(coefficient), 0)
        values[coefficient] = router_training.train(
            model, settings(**keys, max_steps=1), chats, work
        )
    # balanced experts give 1, a single one gives 2
    assert 0.99 < values[1.0][0]["loss"] - values[0.0][0]["loss"] < 2.01


def test_shares_by_role_are_means_over_the_tokens_of_a_role():
    model = drawn(join(*pair()))
    chats = [
        Chat("a", [5, 6, 7], [False] * 3, ["prompt", "answer", "answer"]),
        Chat("b", [8, 9], [False] * 2, ["answer", "template"]),
    ]
    actual = routers.shares_by_role(model, chats)
    first, second = routers.bi_share(model, [torch.tensor([chat.ids]) for chat in chats])
    for layer, row in enumerate(actual):
        answers = (first[layer, 1] + first[layer, 2] + second[layer, 0]) / 3
        assert row["answer"] == pytest.approx(answers.item())
        assert row["prompt"] == pytest.approx(first[layer, 0].item())
        assert row["template"] == pytest.approx(second[layer, 1].item())
        assert row["punctuation"] is None


def test_what_is_watched_are_means_over_the_real_tokens(chats):
    model = drawn(join(*pair(vocab_size=1000)))
    batch = collate(chats[:3])
    batch.pop("labels")
    real = batch["attention_mask"].bool()
    assert not real.all()
    with router_training._watching(model) as watch, torch.no_grad():
        watch.real = batch["attention_mask"]
        output = model(**batch, output_router_logits=True)
    shares = [logits.softmax(-1)[real.flatten()] for logits in output.router_logits]
    bi = [share[:, 1].mean().item() for share in shares]
    entropy = [torch.distributions.Categorical(share).entropy().mean().item() for share in shares]
    actual = watch.metrics()
    assert actual["bi_weight_by_layer"] == pytest.approx(bi)
    assert actual["bi_weight"] == pytest.approx(sum(bi) / len(bi))
    assert actual["router_entropy"] == pytest.approx(sum(entropy) / len(entropy), rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["ubmoe.top_k=1", "ubmoe.norm_topk_prob=true"], "the routers get no gradient"),
        (["ubmoe.top_k=1"], "expected router_init: uni"),
        (["ubmoe.router_aux_loss_coef=0.1"], "constant where every token has both experts"),
        (
            ["ubmoe.objective=both", "ubmoe.activation_checkpointing=true"],
            "under the mask of the chats",
        ),
    ],
)
def test_routers_that_cannot_learn_are_refused_with_the_reason(keys, expected):
    with pytest.raises(UserError, match=expected):
        load_config(None, keys)
    load_config(None, [*keys, "ubmoe.max_steps=0"])


def test_adapters_on_a_mixture_are_refused_with_the_reason():
    model = join(*pair())
    with pytest.raises(UserError, match="would reach the shared expert only"):
        lora.attach(model, [name for name, _ in model.named_parameters()], LoraSection())


def test_only_a_mixture_has_routers(chats, tmp_path):
    with pytest.raises(UserError, match="is no mixture of two experts"):
        router_training.train(random_model("qwen2"), settings(), chats, StageRun(tmp_path, 0))


@pytest.fixture
def distillation(tiny_path, tokenizer, chats):
    """A mixture of the embedded model and a bi FFN of its own, and its second objective."""
    uni, bi = (AutoModelForCausalLM.from_pretrained(tiny_path) for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in bi.model.layers:
            weight = layer.mlp.down_proj.weight
            weight += torch.randn(weight.shape, generator=generator) * weight.std()
    model = join(uni, bi)
    encoder = as_encoder(model, tokenizer, BiSection(prompt="Say: {text}"))
    return Distillation(chats, ["The dog sleeps.", "Anna eats bread."], encoder, model), bi


def test_the_second_objective_is_the_distance_from_the_encoders_vectors(distillation, tokenizer):
    data, bi = distillation
    batch = data.collated([data[0], data[1]])
    assert torch.equal(batch["labels"], collate(data.chats[:2])["labels"])
    bi.config.is_causal = False
    wanted = as_encoder(bi, tokenizer, BiSection(prompt="Say: {text}")).encode(
        data.sentences, convert_to_tensor=True
    )
    data.model.config.is_causal = False
    actual = data.encoder.encode(data.sentences, convert_to_tensor=True)
    data.model.config.is_causal = True
    centre = wanted.mean(0)
    expected = 1 - torch.nn.functional.cosine_similarity(actual - centre, wanted - centre).mean()
    assert data.distance(batch["sentences"]).item() == pytest.approx(expected.item(), abs=1e-5)
    assert expected > 0.01 and data.model.config.is_causal is True


def test_routers_learn_both_objectives(distillation, tmp_path):
    data, _ = distillation
    keys = {"objective": "both", "max_steps": 15, "learning_rate": 0.02, "embedding_weight": 10.0}
    log = router_training.train(
        data.model, settings(**keys), data.chats, StageRun(tmp_path, 0), data
    )
    rows = [row for row in log if "loss" in row]
    assert rows[-1]["embedding_distance"] < 0.8 * rows[0]["embedding_distance"]
