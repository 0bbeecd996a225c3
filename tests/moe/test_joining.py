"""The laws of the mixture, against a block written from the formula alone."""

import copy
import math

import pytest
import torch
from builders import IDS, JOINED, WINDOW, drawn, join, logits, pair, random_model
from torch.nn.functional import linear, silu, softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe.bidirectional import set_attention, set_layers
from ubmoe.config import UserError
from ubmoe.moe import routers
from ubmoe.moe.routers import router_weights
from ubmoe.moe.routes import BI, UNI, blocks, route_of, set_route
from ubmoe.tiny import language


def ffn(layer, x):
    return linear(
        silu(linear(x, layer.gate_proj.weight)) * linear(x, layer.up_proj.weight),
        layer.down_proj.weight,
    )


@torch.no_grad()
def by_formula(uni, bi, gates, top_k, renormalised=False):
    """Final logits of the mixture, with the FFN of every layer of `uni` replaced by the formula."""
    mixed = copy.deepcopy(uni)
    for number, layer in enumerate(mixed.model.layers):

        def forward(x, number=number):
            p = softmax(linear(x, gates[number]), dim=-1)
            if top_k == 1:
                p = p * (p == p.max(-1, keepdim=True).values)
            if renormalised:
                p = p / p.sum(-1, keepdim=True)
            a, b = (ffn(model.model.layers[number].mlp, x) for model in (uni, bi))
            return p[..., :1] * a + p[..., 1:] * b

        layer.mlp.forward = forward
    return logits(mixed)


@pytest.mark.parametrize("implementation", ["eager", "ubmoe"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("top_k", "renormalised"), [(2, False), (1, False), (1, True)])
def test_the_mixture_is_the_formula(implementation, tied, top_k, renormalised):
    uni, bi = pair(tied)
    model = drawn(join(uni, bi, top_k))
    for block in blocks(model):
        block.gate.norm_topk_prob = renormalised
    model.set_experts_implementation(implementation)
    gates = [value.detach() for value in router_weights(model).values()]
    expected = by_formula(uni, bi, gates, top_k, renormalised)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(uni)).abs().max() > 0.1 < (expected - logits(bi)).abs().max()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "ubmoe"])
def test_equal_experts_are_the_dense_model(implementation):
    uni, _ = pair()
    model = drawn(join(uni, uni, 2))
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model), logits(uni), atol=1e-5, rtol=1e-5)
    for block in blocks(model):
        block.gate.top_k, block.gate.norm_topk_prob = 1, True
    torch.testing.assert_close(logits(model), logits(uni), atol=1e-5, rtol=1e-5)


def test_zero_routers_give_the_average_of_the_two_outputs():
    uni, bi = pair()
    model = join(uni, bi, 2)
    assert all(not value.any() for value in router_weights(model).values())
    gates = [torch.zeros(2, 32)] * 2
    expected = by_formula(uni, bi, gates, 2)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    set_route(model, "half")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_the_average_is_one_ffn_of_averaged_weights():
    uni, bi = pair()
    model = join(uni, bi)
    set_route(model, "average")
    with torch.no_grad():
        for own, other in zip(uni.parameters(), bi.parameters(), strict=True):
            own.copy_((own + other) / 2)
    torch.testing.assert_close(logits(model), logits(uni), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("expert", "top_k"), [(UNI, 2), (BI, 2), (UNI, 1), (BI, 1)])
def test_a_saturated_router_gives_its_expert(expert, top_k):
    uni, bi = pair()
    model = join(uni, bi, top_k)
    seen = []
    wanted = (uni, bi)[expert]
    for layer in wanted.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    ids = IDS[:, :9]  # fewer tokens than dimensions: a direction that fits them all exists
    expected = logits(wanted, ids)
    for value, x in zip(router_weights(model).values(), seen, strict=True):
        x = x.reshape(-1, x.shape[-1])
        direction = torch.linalg.lstsq(x, torch.ones(len(x), 1)).solution[:, 0]
        rows = [direction * 100, -direction * 100]
        with torch.no_grad():
            value.copy_(torch.stack(rows if expert == UNI else rows[::-1]))
        assert (x @ direction).min() > 0.5
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", JOINED)
def test_every_family_is_joined_without_loss(name, tied):
    """Longer than the windows: routes bit for bit under both masks, equal experts the dense."""
    family, keys = JOINED[name]
    uni, bi = pair(tied, family, **keys)
    model = join(uni, bi)
    for bidirectional in (False, True):
        for item in (model, uni, bi):
            set_attention(item, bidirectional)
        for route, dense in (("uni", uni), ("bi", bi)):
            with route_of(model, route):
                assert torch.equal(logits(model), logits(dense)), (route, bidirectional)
        assert not torch.equal(logits(uni), logits(bi))
    set_attention(uni, bidirectional=False)
    same = drawn(join(uni, uni))
    torch.testing.assert_close(logits(same), logits(uni), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", ["all", [1]])
def test_a_mixture_reads_under_the_mask_of_its_encoder(layers):
    uni, bi = pair()
    plain = set_attention(copy.deepcopy(bi), bidirectional=True)
    model = join(uni, set_layers(bi, layers, keep_sink=True))
    assert model.config.keep_sink is True
    for item in (model, bi):
        set_attention(item, bidirectional=True)
    with route_of(model, "mode"):
        assert torch.equal(logits(model), logits(bi))
        assert not torch.allclose(logits(bi), logits(plain))
        set_attention(model, bidirectional=False)
        assert torch.equal(logits(model), logits(uni))


@pytest.mark.parametrize(
    ("family", "keys", "expected"),
    [
        ("llama", {"attention_bias": True}, "o_proj.bias.* which the class"),
        ("llama", {"mlp_bias": True}, "mlp.down_proj.bias.* which the class"),
        ("gemma", {}, "is gemma; expected one of qwen2, llama, mistral, qwen3"),
        (
            "qwen3",
            WINDOW | {"layer_types": ["full_attention", "sliding_attention"]},
            "mix sliding and full attention, which Qwen3Moe cannot say",
        ),
    ],
)
def test_what_a_mixtures_class_would_drop_is_refused_by_name(family, keys, expected):
    uni, bi = pair(True, family, **keys)
    with pytest.raises(UserError, match=expected):
        join(uni, bi)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forced_routes_are_the_dense_models_bit_for_bit(dtype):
    uni, bi = (model.to(dtype) for model in pair())
    model = join(uni, bi)
    drawn(model)
    model.to(dtype)  # as a loader in this dtype has it; join keeps float32 routers
    learned = logits(model)
    with route_of(model, "uni"):
        assert torch.equal(logits(model), logits(uni))
    with route_of(model, "bi"):
        assert torch.equal(logits(model), logits(bi))
        for item in (model, bi):
            set_attention(item, bidirectional=True)
        assert torch.equal(logits(model), logits(bi))
    with route_of(model, "mode"):
        assert torch.equal(logits(model), logits(bi))
        set_attention(model, bidirectional=False)
        assert torch.equal(logits(model), logits(uni))
    torch.testing.assert_close(logits(model), learned)


def test_a_bfloat16_mixture_of_saved_models_is_exact_and_needs_no_autocast(tmp_path):
    """Joined as the program joins: rotary frequencies and routers stay float32."""
    for name, model in zip(("uni", "bi"), pair(max_position_embeddings=512), strict=True):
        model.save_pretrained(tmp_path / name)
    uni, bi = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        for name in ("uni", "bi")
    )
    model = drawn(join(uni, bi))
    long = torch.randint(97, (1, 300), generator=torch.Generator().manual_seed(2))
    assert logits(model, long).isfinite().all()  # by its float32 routers
    for route, dense in (("uni", uni), ("bi", bi)):
        with route_of(model, route):
            assert torch.equal(logits(model, long), logits(dense, long))


def test_routers_are_float32_and_all_else_has_the_models_dtype():
    uni, bi = (model.bfloat16() for model in pair())
    model = join(uni, bi)
    assert {value.dtype for value in router_weights(model).values()} == {torch.float32}
    rest = [value for name, value in model.named_parameters() if name not in router_weights(model)]
    assert {value.dtype for value in rest} == {torch.bfloat16}


def test_what_differs_outside_the_ffn_is_refused_by_name():
    uni, bi = pair()
    with torch.no_grad():
        bi.model.layers[1].self_attn.k_proj.weight[0, 0] += 1
    with pytest.raises(UserError, match=r"outside the FFN, in model.layers.1.self_attn.k_proj.wei"):
        join(uni, bi)
    with pytest.raises(UserError, match=r"ubmoe.bi: other shapes than model.name in "):
        join(uni, random_model("qwen2", intermediate_size=40))
    with pytest.raises(UserError, match=r"other shapes than model.name in model.layers.2"):
        join(uni, random_model("qwen2", num_hidden_layers=3))
    turned = copy.deepcopy(uni)
    turned.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    with pytest.raises(UserError, match="ubmoe.bi: another rope_parameters than model.name"):
        join(uni, turned)
    with pytest.raises(UserError, match="is qwen2, and model.name is llama; expected the same"):
        join(random_model("llama"), bi)


@pytest.mark.parametrize("broken", ["uni", "bi"])
def test_numbers_that_are_not_finite_are_named_with_their_model(broken):
    models = dict(zip(("uni", "bi"), pair(), strict=True))
    with torch.no_grad():
        models[broken].model.layers[1].mlp.up_proj.weight[2, 1] = math.inf
    expected = f"model.name: {broken} has NaN or infinite weights in model.layers.1.mlp.up_proj.we"
    with pytest.raises(UserError, match=expected):
        join(**models)
    for model in models.values():  # so that comparing finds them different, too
        with torch.no_grad():
            model.model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="uni has NaN or infinite weights in .*model.norm.weight"):
        join(**models)


def test_only_the_dtype_of_the_mixture_counts_where_models_are_compared():
    uni, bi = pair()
    with torch.no_grad():
        bi.model.norm.weight += 1e-5
    with pytest.raises(UserError, match="outside the FFN, in model.norm.weight; the mixture"):
        join(uni, bi)
    join(uni.bfloat16(), bi.bfloat16())


def test_a_route_needs_a_mixture_of_two():
    with pytest.raises(UserError, match="is no mixture of two experts"):
        set_route(random_model("qwen2"), "uni")
    with pytest.raises(UserError, match="is no mixture of two experts"):
        set_route(random_model("qwen2_moe", num_experts=4), "uni")


def test_the_fitted_start_prefers_uni_on_texts_that_it_has_not_seen(tiny_path):
    uni = AutoModelForCausalLM.from_pretrained(tiny_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    model = join(uni, uni)
    texts = [torch.tensor([tokenizer(text)["input_ids"]]) for text in language.sentences(200, 11)]
    routers.fit_routers(model, texts[:150])
    share = torch.cat([item.flatten() for item in routers.bi_share(model, texts[150:])])
    assert (share < 0.5).float().mean() > 0.98
    assert share.mean() == pytest.approx(1 / (1 + math.exp(routers.MARGIN)), abs=0.05)
    assert blocks(model)[0].route == "learned" and "forward" not in vars(blocks(model)[0])


def test_drawn_routers_are_those_of_the_seed():
    uni, bi = pair()
    first, again, other = (join(uni, bi) for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        routers.start_routers(model, seed)
    values = [
        torch.cat([v.detach().flatten() for v in router_weights(m).values()])
        for m in (first, again, other)
    ]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert values[0].std() == pytest.approx(0.02, rel=0.2)
