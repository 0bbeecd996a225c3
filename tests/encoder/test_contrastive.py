"""The loss against a hand-written softmax, what trains, the views, and a run that was killed."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from builders import KilledError, random_model
from sentence_transformers import SentenceTransformer
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe.config import BiSection, LoraSection, StageSection, UserError
from ubmoe.encoder import contrastive, contrastive_loss
from ubmoe.encoder.contrastive import attention_dropout
from ubmoe.encoder.contrastive_loss import CachedContrastiveLoss, ContrastiveLoss
from ubmoe.encoder.sentence_encoder import as_encoder
from ubmoe.training.checkpoints import StageRun
from ubmoe.training.modules import named_by, train_only

SENTENCES = [
    f"The {noun} {verb} the {other}."
    for noun, verb, other in zip(
        ("cat", "dog", "old king", "sea", "strange wooden boat", "bird", "cook", "thief"),
        ("chased", "saw", "owned", "covered", "struck", "feared", "heated", "watched"),
        ("mouse", "small pale horse near the river", "lamp", "rock", "box", "wolf", "soup", "cart"),
        strict=True,
    )
]
TEMPERATURE = 0.1


@pytest.fixture
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


def build(tokenizer, family="qwen2", **keys):
    """(encoder, causal LM) on a random model with the embedded tokenizer."""
    model = random_model(family, vocab_size=len(tokenizer), **keys)
    model.config.is_causal = False
    return as_encoder(model, tokenizer, BiSection(prompt=None)), model


def columns_of(encoder: SentenceTransformer, *columns):
    return [dict(encoder.preprocess(list(column))) for column in columns]


def by_hand(columns, form, temperature=TEMPERATURE):
    """The published softmax, an anchor at a time."""
    a, b, *negatives = [normalize(column, dim=-1) for column in columns]
    count = len(a)
    if form == "simcse":
        candidates = torch.cat((b, *negatives))
        return cross_entropy(a @ candidates.T / temperature, torch.arange(count))
    views = torch.cat((a, b))
    losses = []
    for i in range(2 * count):
        partner = (i + count) % (2 * count)
        scores = [
            float("-inf") if j == i else views[i] @ views[j] / temperature for j in range(2 * count)
        ]
        scores = torch.stack([torch.as_tensor(score) for score in scores])
        losses.append(scores.logsumexp(0) - scores[partner])
    return torch.stack(losses).mean()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [ContrastiveLoss, CachedContrastiveLoss])
@pytest.mark.parametrize(
    ("form", "hard"), [("nt_xent", 0), ("simcse", 0), ("simcse", 1), ("simcse", 2)]
)
@pytest.mark.parametrize(
    ("budget", "family"),
    [(1, "qwen2"), (40, "qwen2"), (10**6, "qwen2"), (40, "llama"), (40, "mistral"), (40, "qwen3")],
)
def test_loss_and_gradient_are_those_of_the_hand_written_softmax(
    tokenizer, kind, form, hard, budget, family
):
    encoder, model = build(tokenizer, family)
    texts = [SENTENCES[:4], SENTENCES[4:], SENTENCES[2:6], SENTENCES[1:5]][: 2 + hard]
    plain = [encoder(features)["sentence_embedding"] for features in columns_of(encoder, *texts)]
    expected = by_hand(plain, form)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    loss = kind(encoder, form, TEMPERATURE, budget)(columns_of(encoder, *texts))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), atol=1e-5, rtol=1e-5)
    actual = gradients(model)
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, atol=1e-4, rtol=1e-3)


def test_mini_batches_keep_within_the_budget_and_drop_padding(tokenizer):
    encoder, _ = build(tokenizer)
    merged, order = contrastive_loss.by_length(columns_of(encoder, SENTENCES[:4], SENTENCES[4:]))
    lengths = merged["attention_mask"].sum(1).tolist()
    assert lengths == sorted(lengths)
    assert sorted(order.tolist()) == list(range(8))
    ranges = contrastive_loss.least_padding(lengths, 40)
    assert [i for low, high in ranges for i in range(low, high)] == list(range(8))
    places = contrastive_loss.spans(merged["attention_mask"]).tolist()
    for low, high in ranges:
        piece = contrastive_loss.cropped(merged, places, low, high)["attention_mask"]
        assert piece.shape == (high - low, lengths[high - 1])
        assert piece.numel() <= 40 or len(piece) == 1
    vectors = torch.arange(8.0)[:, None]
    first, second = contrastive_loss.in_columns(vectors[order], order, 2)
    assert first.flatten().tolist() == [0, 1, 2, 3] and second.flatten().tolist() == [4, 5, 6, 7]


def test_mini_batches_are_split_for_processes_that_have_more_of_them():
    ranges = [(0, 3), (3, 8)]
    assert contrastive_loss.split(ranges, 2) == ranges
    assert contrastive_loss.split(ranges, 4) == [(0, 1), (1, 3), (3, 5), (5, 8)]
    assert contrastive_loss.split(ranges, 8) == [(n, n + 1) for n in range(8)]


def test_the_split_is_the_best_of_all_within_the_budget():
    def splits(count):
        for cuts in itertools.product((False, True), repeat=count - 1):
            edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), count]
            yield list(itertools.pairwise(edges))

    def cost(lengths, ranges, budget):
        more = budget // contrastive_loss.STARTS
        return sum((high - low) * lengths[high - 1] + more for low, high in ranges)

    draw = random.Random(0)
    for _ in range(30):
        lengths = sorted(draw.choices(range(1, 900), k=9))
        budget = draw.randrange(300, 4000)
        actual = contrastive_loss.least_padding(lengths, budget)
        allowed = [
            ranges
            for ranges in splits(9)
            if all((b - a) * lengths[b - 1] <= budget or b - a == 1 for a, b in ranges)
        ]
        assert actual in allowed
        assert cost(lengths, actual, budget) == min(cost(lengths, r, budget) for r in allowed)


@pytest.mark.parametrize("side", ["left", "right"])
def test_spans_are_where_each_row_is_no_padding(side):
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    mask = mask.flip(1) if side == "left" else mask
    begins = [2, 1, 0] if side == "left" else [0, 0, 0]
    expected = [[n, begin, begin + n] for n, begin in zip((2, 3, 4), begins, strict=True)]
    assert contrastive_loss.spans(mask).tolist() == expected
    features = {"attention_mask": mask, "input_ids": mask * 7, "prompt_length": 1}
    piece = contrastive_loss.cropped(features, expected, 0, 2)
    assert piece["prompt_length"] == 1 and (piece["input_ids"] == piece["attention_mask"] * 7).all()
    expected = [[0, 1, 1], [1, 1, 1]] if side == "left" else [[1, 1, 0], [1, 1, 1]]
    assert piece["attention_mask"].tolist() == expected


def test_the_budget_follows_the_card_and_a_number_is_a_number(monkeypatch):
    card = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert contrastive_loss.mini_batch("auto", cpu) == 2048
    assert contrastive_loss.mini_batch("auto", cuda) == 9 * 2048
    card.total_memory = 10**9
    assert contrastive_loss.mini_batch("auto", cuda) == 2048
    assert contrastive_loss.mini_batch(300, cuda) == 300
    assert StageSection().mini_batch_tokens == "auto"
    assert StageSection(cached=True).mini_batch_tokens == 2048  # what bounds its memory
    assert StageSection(cached=True, mini_batch_tokens=300).mini_batch_tokens == 300


def test_a_cached_batch_keeps_within_the_budget(tokenizer, monkeypatch):
    encoder, model = build(tokenizer)
    sizes, real = [], model.model.forward  # sentence-transformers calls it past all hooks

    def forward(input_ids, **keys):
        sizes.append(tuple(input_ids.shape))
        return real(input_ids=input_ids, **keys)

    monkeypatch.setattr(encoder[0].model, "forward", forward)
    loss = CachedContrastiveLoss(encoder, "simcse", TEMPERATURE, 40)
    loss(columns_of(encoder, SENTENCES[:4], SENTENCES[4:])).backward()
    assert len(sizes) > 4 and all(rows * width <= 40 or rows == 1 for rows, width in sizes)


def test_geometry_is_that_of_hand_computed_vectors():
    anchors, positives = torch.tensor([[2.0, 0], [0, 3.0]]), torch.tensor([[1.0, 0], [1.0, 0]])
    actual = contrastive_loss.geometry(anchors, positives)
    assert actual["positive_cosine"] == pytest.approx(0.5)  # cosines 1 and 0
    assert actual["negative_cosine"] == pytest.approx(0.5)  # of a_1 with b_2, and of a_2 with b_1
    assert actual["alignment"] == pytest.approx(1.0)  # squared distances 0 and 2
    assert actual["uniformity"] == pytest.approx(-4.0)  # log exp(-2 x 2)


def test_identical_views_stop_the_run(tokenizer):
    encoder, model = build(tokenizer)
    loss = ContrastiveLoss(encoder, "nt_xent", 0.05, 1000, views_must_differ=True)
    same = columns_of(encoder, SENTENCES[:4], SENTENCES[:4])
    encoder.train()
    with pytest.raises(UserError, match="views of every sentence are identical"):
        loss(same)
    with attention_dropout(model, 0.3):
        loss(same)


def test_the_models_own_dropout_is_back_afterwards():
    model = random_model("qwen2", attention_dropout=0.1)
    with attention_dropout(model, 0.4):
        assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.4}
    assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.1}


@pytest.mark.parametrize("tied", [True, False])
def test_the_words_for_modules_name_the_right_parameters(tied):
    model = random_model("qwen2", tie_word_embeddings=tied)
    names = dict(model.named_parameters())
    assert all(".mlp." in name for name in named_by(model, "ffn"))
    assert len(named_by(model, "ffn")) == 6 and len(named_by(model, "ffn_up_down")) == 4
    assert len(named_by(model, "attention")) == 14  # q, k, v with biases, o, of two layers
    assert named_by(model, "embedding") == ["model.embed_tokens.weight"]
    assert set(names) - set(named_by(model, "all")) == (set() if tied else {"lm_head.weight"})
    counts = train_only(model, ["ffn", "embedding"])
    assert counts == {"ffn": 2 * 3 * 32 * 48, "embedding": 97 * 32}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(counts.values())


def test_a_model_without_the_named_module_is_refused():
    model = random_model("gpt2", n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(UserError, match="GPT2LMHeadModel has no attention module; it has .*c_attn"):
        named_by(model, "attention")


def stage(tmp_path, **keys):
    """A short SimCSE stage over SENTENCES and more of their kind."""
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(f"{text} {n}" for n in range(6) for text in SENTENCES))
    common = {"dataset": str(path), "learning_rate": 1e-3, "per_device_train_batch_size": 8}
    return StageSection(**common | {"max_steps": 3, "logging_steps": 1} | keys)


def train(encoder, model, settings, directory, resume=False):
    data, _ = contrastive.read_dataset(settings, encoder.tokenizer)
    work = StageRun(directory, 0, resume)
    return contrastive.train_stage(encoder, model, settings, data, work)


@pytest.mark.parametrize(
    "modules", [["ffn"], ["attention"], ["embedding"], ["all"], ["ffn", "attention"]]
)
def test_only_the_named_modules_move_and_all_of_them_do(tokenizer, tmp_path, modules):
    encoder, model = build(tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = train(encoder, model, stage(tmp_path, train=modules), tmp_path)
    moved = {
        name for name, value in model.named_parameters() if not torch.equal(value, before[name])
    }
    assert moved == {name for module in modules for name in named_by(model, module)}
    assert report["negatives_per_anchor"] == 14
    assert {"loss", "alignment", "uniformity", "positive_cosine"} <= set(report["log"][0])


@pytest.mark.parametrize("cached", [False, True])
def test_training_sees_the_prompt_and_leaves_it_out_of_the_mean(tokenizer, tmp_path, cached):
    """The loss of the first step is that of `encode`'s vectors."""
    model = random_model("qwen2", vocab_size=len(tokenizer))
    bi = BiSection(prompt="Say this:\n{text}", prompt_in_mean=False)
    encoder = as_encoder(model, tokenizer, bi)
    rows = ["sent0,sent1", *(f"{a},{b}" for a, b in zip(SENTENCES[:4], SENTENCES[4:], strict=True))]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    vectors = [
        encoder.encode(part, convert_to_tensor=True) for part in (SENTENCES[:4], SENTENCES[4:])
    ]
    keys = {"objective": "supervised", "dataset": str(tmp_path / "pairs.csv"), "cached": cached}
    settings = stage(tmp_path, max_steps=1, per_device_train_batch_size=4, **keys)
    report = train(encoder, model, settings, tmp_path)
    expected = by_hand(vectors, "nt_xent", settings.temperature).item()
    assert report["log"][0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_training_separates_sentences(tokenizer, tiny_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.config.is_causal = False
    encoder = as_encoder(model, tokenizer, BiSection(prompt=None))
    keys = {"dataset": "tiny", "max_rows": 800, "max_steps": 20, "per_device_train_batch_size": 32}
    report = train(encoder, model, stage(tmp_path, **keys), tmp_path)
    losses = [row["loss"] for row in report["log"] if "loss" in row]
    cosines = [row["negative_cosine"] for row in report["log"] if "loss" in row]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), losses
    assert cosines[-1] < cosines[0] / 2, cosines


@pytest.mark.parametrize("lora", [None, LoraSection(rank=2)])
def test_a_killed_run_goes_on_to_the_same_weights(tokenizer, tmp_path, dying, lora):
    whole, model = build(tokenizer)
    # 48 sentences in batches of 8: the run is killed in its second epoch
    keys = {"max_steps": 12, "save_steps": 3, "lora": lora}
    train(whole, model, stage(tmp_path, **keys), tmp_path / "whole")
    encoder, other = build(tokenizer)

    steps = dying(contrastive.ContrastiveTrainer, 11)
    with pytest.raises(KilledError):
        train(encoder, other, stage(tmp_path, **keys), tmp_path / "half")
    encoder, other = build(tokenizer)
    train(encoder, other, stage(tmp_path, **keys), tmp_path / "half", True)
    assert len(steps) == 11 + 3  # nine steps were not taken again
    for (name, value), (_, resumed) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(value, resumed), name


def test_checkpoints_of_another_run_are_not_taken_up(tokenizer, tmp_path):
    directory = tmp_path / "stage"
    encoder, model = build(tokenizer)
    train(encoder, model, stage(tmp_path, save_steps=1), directory)
    assert (directory / "checkpoint-3").exists()
    fresh, expected = build(tokenizer)
    train(fresh, expected, stage(tmp_path, save_steps=1, max_steps=2), tmp_path / "fresh")
    encoder, model = build(tokenizer)
    train(encoder, model, stage(tmp_path, save_steps=1, max_steps=2), directory, True)
    assert not (directory / "checkpoint-3").exists()
    for (name, value), (_, other) in zip(
        model.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert torch.equal(value, other), name


def test_a_loss_that_is_not_finite_stops_at_that_step(tokenizer, tmp_path):
    encoder, model = build(tokenizer)
    with pytest.raises(UserError, match=r"step \d: the (loss is nan|gradient of .* is not finite)"):
        train(
            encoder,
            model,
            stage(tmp_path, max_steps=9).model_copy(update={"learning_rate": 1e30}),
            tmp_path,
        )


def test_supervised_rows_and_hard_negatives(tokenizer, tmp_path):
    path = tmp_path / "triplets.csv"
    rows = [
        f"{a},{b},{c}" for a, b, c in zip(SENTENCES, SENTENCES[1:], SENTENCES[2:], strict=False)
    ]
    path.write_text("\n".join(["sent0,sent1,hard_neg", *rows]))
    keys = {"objective": "supervised", "dataset": str(path), "per_device_train_batch_size": 2}
    encoder, model = build(tokenizer)
    settings = stage(tmp_path, loss="simcse", max_steps=1, **keys)
    report = train(encoder, model, settings, tmp_path)
    assert report["negatives_per_anchor"] == 3  # the other positive, two hard negatives
    assert report["log"][-1]["step"] == 1
    three = settings.model_copy(update={"per_device_train_batch_size": 3})
    with pytest.raises(UserError, match="nothing was trained: the rows make no batch of 3"):
        train(encoder, model, three, tmp_path / "stages" / "0")  # each text is in three rows
    assert not (tmp_path / "stages").exists()
    with pytest.raises(UserError, match="nt_xent knows no hard negatives"):
        train(encoder, model, stage(tmp_path, **keys), tmp_path)


@pytest.mark.parametrize("cached", [False, True])
def test_labelled_rows_with_several_negatives_train_as_positives_alone(tokenizer, tmp_path, cached):
    """The loss of the one batch is that of the rows at the threshold, all negatives in it."""
    path = tmp_path / "labelled.csv"
    texts = [f"{text} {n}" for n in range(4) for text in SENTENCES]
    rows = [f"{','.join(texts[n::8])},{n % 2}" for n in range(8)]
    path.write_text("\n".join(["anchor,positive,negative_1,negative_2,label", *rows]))
    encoder, model = build(tokenizer)
    columns = [[texts[column * 8 + n] for n in (1, 3, 5, 7)] for column in range(4)]
    expected = by_hand([encoder.encode(c, convert_to_tensor=True) for c in columns], "simcse")
    keys = {"objective": "supervised", "dataset": str(path), "positive_from": 1, "cached": cached}
    keys |= {"loss": "simcse", "max_steps": 1, "per_device_train_batch_size": 4}
    settings = stage(tmp_path, temperature=TEMPERATURE, **keys)
    data, below = contrastive.read_dataset(settings, tokenizer)
    work = StageRun(tmp_path, 0)
    report = contrastive.train_stage(encoder, model, settings, data, work, below=below)
    assert (report["rows"], report["rows_below_positive_from"]) == (4, 4)
    assert report["negatives_per_anchor"] == 4 + 4 + 3
    assert report["log"][0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("content", "objective", "expected"),
    [
        ("text\nsame\nsame\n", "simcse", "expected two different texts"),
        ("words\na\nb\n", "simcse", ":2: lacks a column text or sentence (it has words)"),
        ("text\na\n \n", "simcse", ":3: empty text"),
        ("sent0,other\na,b\n", "supervised", ":2: lacks a column positive or pos or sent1"),
    ],
)
def test_data_that_cannot_train_is_refused(tokenizer, tmp_path, content, objective, expected):
    path = tmp_path / "data.csv"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        refused = StageSection(dataset=str(path), objective=objective)
        contrastive.read_dataset(refused, tokenizer)
    assert expected in str(caught.value)
