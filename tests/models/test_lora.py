"""Adapters train alone, are merged exactly, and are read only under the mask they say."""

import json
import re
import shutil

import pytest
import torch
from builders import logits, random_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from ubmoe.config import LoraSection, ModelSection, StageSection, UserError
from ubmoe.models import lora
from ubmoe.models.loading import load_model
from ubmoe.training.checkpoints import StageRun
from ubmoe.training.modules import named_by, tuning


def section(path, **keys):
    return ModelSection(name=str(path), device="cpu", **keys)


def refused(path, adapter):
    with pytest.raises(UserError) as caught:
        load_model(section(path, adapter=adapter if isinstance(adapter, list) else str(adapter)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_adapter(model, path, mode='{"attention": "causal"}', **keys):
    settings = LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | keys)
    wrapped = get_peft_model(model, settings)
    wrapped.save_pretrained(path)
    if mode:
        (path / "ubmoe.json").write_text(mode)
    return wrapped.eval()


@pytest.mark.parametrize("headless", [False, True])
def test_an_adapter_is_merged_whether_it_was_trained_with_the_head_or_without(
    saved, tmp_path, headless
):
    plain = load_model(section(saved))
    expected = load_model(section(saved))
    keys = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    inner = expected.model if headless else expected
    wrapped = write_adapter(inner, tmp_path / "adapter", **keys)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        merged = load_model(section(saved, adapter=str(tmp_path / "adapter")))
        if headless:
            expected.model = wrapped
        want = expected(ids).logits if headless else wrapped(ids).logits
        torch.testing.assert_close(merged(ids).logits, want, atol=1e-4, rtol=1e-4)
        assert (merged(ids).logits - plain(ids).logits).abs().max() > 1e-2


KINDS = {
    "attention": {},
    "head": {"target_modules": ["lm_head"]},
    "attention and head": {"target_modules": ["q_proj", "lm_head"]},
    "attention and embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding, tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "an embedding of its own": {"modules_to_save": ["embed_tokens"]},
    "both of their own, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "a norm of its own": {"modules_to_save": ["norm"]},
    "some tokens": {"trainable_token_indices": [5, 6]},
    "bias": {"bias": "all"},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
}
PARTED = [name for name in KINDS if re.search("head|embedding|dora", name) and "tied" not in name]


def moved(model, scale=0.1):
    """Every weight of the adapter away from where it starts."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=generator) * scale)
    return model


def tied_and_adapted(tmp_path, **kind):
    """(directory of a tied model, of its adapter, logits of the two as peft computes them)."""
    random_model("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    model = load_model(section(tmp_path / "model"))
    moved(write_adapter(model, tmp_path / "adapter", **kind)).save_pretrained(tmp_path / "adapter")
    plain = load_model(section(tmp_path / "model"))
    apart = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    return tmp_path / "model", tmp_path / "adapter", logits(apart)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_into_tied_weights_an_adapter_computes_what_it_does_apart(tmp_path, kind):
    path, adapter, expected = tied_and_adapted(tmp_path, **KINDS[kind])
    model = load_model(section(path, adapter=str(adapter)))
    assert (expected - logits(load_model(section(path)))).abs().max() > 0.1
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)
    parted = model.lm_head.weight is not model.model.embed_tokens.weight
    assert parted == (kind in PARTED) == (not model.config.tie_word_embeddings)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        logits(load_model(section(tmp_path / "again"))), expected, atol=1e-4, rtol=0
    )


def test_an_adapter_of_the_head_moves_no_states(tmp_path):
    path, adapter, _ = tied_and_adapted(tmp_path, target_modules=["lm_head"])
    plain, model = (load_model(section(path, adapter=item)) for item in (None, str(adapter)))
    for one, other in zip(plain.model.parameters(), model.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_adapters_are_merged_in_order_each_on_what_is_below_it(saved, tmp_path):
    model = load_model(section(saved))
    paths = []
    for number, module in enumerate(("q_proj", "up_proj")):
        wrapped = moved(write_adapter(model, tmp_path / f"made-{module}", target_modules=[module]))
        lora.save(wrapped, tmp_path / module, stages_before=number)
        paths.append(str(tmp_path / module))
        expected = logits(wrapped)
        lora.merge(wrapped)
    actual = logits(load_model(section(saved, adapter=paths)))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert "the adapters of all of them in order" in refused(saved, paths[1:])
    again = shutil.copytree(paths[0], tmp_path / "again")
    assert "trained on other weights" in refused(saved, [paths[0], str(again)])


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_that_began_by_changing_the_base_is_refused(saved, tmp_path, start):
    real = start if start.startswith(("pissa", "olora")) else True
    write_adapter(load_model(section(saved)), tmp_path / "a", init_lora_weights=real)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": start}))
    said = refused(saved, tmp_path / "a")
    assert f"init_lora_weights={start} changes the base's weights, too" in said
    assert "save_pretrained(path_initial_model_for_weight_conversion=...)" in said


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_an_adapter_whose_own_weights_began_otherwise_is_merged(saved, tmp_path, start):
    wrapped = write_adapter(load_model(section(saved)), tmp_path / "a", init_lora_weights=start)
    moved(wrapped).save_pretrained(tmp_path / "a")
    actual = load_model(section(saved, adapter=str(tmp_path / "a")))
    torch.testing.assert_close(logits(actual), logits(wrapped), atol=1e-4, rtol=0)


def test_what_peft_converts_is_merged(saved, tmp_path):
    wrapped = write_adapter(
        load_model(section(saved)), tmp_path / "first", init_lora_weights="pissa_niter_4"
    )
    path = tmp_path / "first" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": True}))
    moved(wrapped)
    expected = logits(wrapped)
    kept = str(tmp_path / "first")
    wrapped.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=kept)
    (tmp_path / "a" / "ubmoe.json").write_text('{"attention": "causal"}')
    actual = load_model(section(saved, adapter=str(tmp_path / "a")))
    torch.testing.assert_close(logits(actual), expected, atol=1e-3, rtol=0)


def test_adapters_that_cannot_be_merged_as_they_compute_are_refused(tmp_path):
    keys = {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}
    path, adapter, _ = tied_and_adapted(tmp_path, **keys)
    assert "aLoRA does not support merging" in refused(path, adapter)
    keys = {"target_modules": ["up_proj"], "lora_bias": True}
    path, adapter, _ = tied_and_adapted(tmp_path, **keys)
    assert "base layer has no bias" in refused(path, adapter)
    grown = random_model("qwen2", vocab_size=99)
    write_adapter(grown, adapter, target_modules=["q_proj", "embed_tokens"])
    assert "of [99, 32], and the model has [97, 32]" in refused(path, adapter)


def test_a_merge_that_changes_what_is_computed_is_refused(saved, tmp_path, monkeypatch):
    moved(write_adapter(load_model(section(saved)), tmp_path / "a")).save_pretrained(tmp_path / "a")
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    assert "merged it would compute something else" in refused(saved, tmp_path / "a")


ENDLESS = "([a-z_.0-9]+)+!"  # twice as long for each letter of a name


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 4}},
        {"alpha_pattern": {ENDLESS: 4}},
        {"layers_pattern": [ENDLESS], "layers_to_transform": [0]},
    ],
)
def test_a_regular_expression_without_an_end_is_refused_in_time(
    saved, tmp_path, monkeypatch, settings
):
    monkeypatch.setattr(lora, "SECONDS", 0.2)
    write_adapter(load_model(section(saved)), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    said = refused(saved, tmp_path)
    assert "its adapter_config.json has a regular expression that takes more than 0.2 s" in said


def test_an_adapter_of_another_shape_or_without_weights_is_refused(saved, tmp_path):
    write_adapter(random_model("qwen2", hidden_size=16), tmp_path / "other")
    assert "does not fit" in refused(saved, tmp_path / "other")
    assert "has no adapter_model.safetensors" in refused(saved, tmp_path)


def test_adapters_that_are_not_lora_or_know_other_modules_are_refused(saved, tmp_path):
    path = tmp_path / "adapter"
    write_adapter(load_model(section(saved)), path)
    tensors = load_file(path / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.9")] = tensors[name].clone()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "tensors for modules that the model lacks" in refused(saved, path)
    settings = json.loads((path / "adapter_config.json").read_text()) | {"peft_type": "IA3"}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    assert "it is IA3, expected LORA" in refused(saved, path)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (None, "does not say how the adapter was trained (No such file or directory)"),
        ("{}", "does not say how the adapter was trained ('attention' is missing)"),
        ("[1]", "was trained (something in it is missing or of an unexpected kind)"),
        ("{", "does not say how the adapter was trained (Expecting property name"),
        ('{"attention": "both"}', "got 'both'; expected"),
        ('{"attention": "causal", "stages_before": 2}', "on top of 2 earlier stages"),
    ],
)
def test_an_adapter_that_does_not_say_its_mask_is_refused(saved, tmp_path, mode, expected):
    write_adapter(load_model(section(saved)), tmp_path / "adapter", mode)
    assert expected in refused(saved, tmp_path / "adapter")


def stage(**keys):
    return StageSection(lora=LoraSection(rank=3, alpha=6.0, dropout=0.0, **keys))


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_the_published_formula_in_fp32_and_then_a_cast(tmp_path, rslora, dtype):
    model = random_model("qwen2").to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = {}
    with tuning(model, stage(rslora=rslora), StageRun(tmp_path, 0)):
        for name, value in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(value, std=0.5)
                adapters[name] = value.detach().clone()
    scale = 6 / 3**0.5 if rslora else 6 / 3
    targets = named_by(model, "ffn")
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        expected = before[name]
        if name in targets:
            stem = name.removesuffix(".weight")
            a, b = (adapters[f"{stem}.lora_{half}.default.weight"] for half in "AB")
            assert a.dtype == torch.float32
            expected = (expected.float() + scale * (b @ a)).to(dtype)
        torch.testing.assert_close(value, expected, atol=1e-6 if name in targets else 0, rtol=0.01)
        assert torch.equal(value, before[name]) == (name not in targets)


def test_only_adapters_on_the_named_modules_train_and_are_counted(tmp_path):
    model = random_model("qwen2")
    with tuning(model, stage(), StageRun(tmp_path, 0)) as counts:
        trainable = [name for name, value in model.named_parameters() if value.requires_grad]
        assert all(".mlp." in name and "lora_" in name for name in trainable)
        assert len(trainable) == 2 * 3 * 2  # layers, projections, halves
        assert counts == {"ffn": 2 * 3 * 3 * (32 + 48)}  # layers, projections, rank, both sides
    assert not any(value.requires_grad for value in model.parameters())


def test_the_saved_adapter_loads_to_the_merged_model(saved, tmp_path):
    model = load_model(section(saved), bidirectional=True)
    with tuning(model, stage(), StageRun(tmp_path / "stage", 0)):
        for name, value in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(value, std=0.5)
    path = str(tmp_path / "stage" / "adapter")
    assert lora.adapter_attention(path) == "bidirectional"
    settings = json.loads((tmp_path / "stage" / "adapter" / "adapter_config.json").read_text())
    assert set(settings["target_modules"]) == {"gate_proj", "up_proj", "down_proj"}
    again = load_model(section(saved, adapter=path), bidirectional=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-6, rtol=0)


def test_an_adapter_of_other_weights_of_the_same_shape_is_refused(saved, tmp_path):
    model = load_model(section(saved), bidirectional=True)
    with tuning(model, stage(), StageRun(tmp_path / "stage", 0)):
        pass
    path = str(tmp_path / "stage" / "adapter")
    load_model(section(saved, adapter=path, dtype="bfloat16"), bidirectional=True)  # the same model
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 5] += 0.1
    model.save_pretrained(tmp_path / "other")
    assert "trained on other weights of the same shape" in refused(tmp_path / "other", path)


def test_modules_without_linear_layers_have_no_adapters(tmp_path):
    model = random_model("gpt2", n_embd=32, n_layer=2, n_head=4)  # its Conv1D is no Linear
    with (
        pytest.raises(UserError, match="GPT2LMHeadModel has no linear layers"),
        tuning(model, stage(), StageRun(tmp_path, 0)),
    ):
        pass
