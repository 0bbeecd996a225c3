"""Bitune's formula, against caches built by hand, numbers on paper, and finite differences."""

import copy
import math
import re
from functools import partial

import pytest
import torch
from builders import ALPHA, EXAMPLES, RANK, random_model, tuned
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoTokenizer, GenerationConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import ubmoe
from ubmoe.bitune import model as prefill
from ubmoe.bitune import saving
from ubmoe.bitune.model import BIDIRECTIONAL, CAUSAL, VARIANTS, attach, mix
from ubmoe.config import BituneSection, UserError, load_config
from ubmoe.data.prompts import Example, batch
from ubmoe.training.losses import mean_loss

STEP = 1e-3  # of the finite differences


def loss(bitune, examples):
    return mean_loss(*bitune(**batch(examples)))


@torch.no_grad()
def scores(bitune, examples):
    """The logits of every example's answer tokens, one after the other."""
    return bitune(**batch(examples))[0]


def test_caches_are_mixed_as_on_paper():
    causal, other = torch.tensor([2.0, -1.0]), torch.tensor([4.0, 3.0])
    assert mix(causal, other, torch.tensor(0.25)).tolist() == [2.5, 0.0]
    # 1 + 2**-9 is no bfloat16: a mean in bfloat16 would have rounded before the difference
    half = torch.tensor([1.0078125], dtype=torch.bfloat16)
    assert mix(half, half, torch.tensor(0.3)).equal(half)
    assert mix(half, half, torch.tensor(0.3)).dtype == torch.bfloat16


def test_alpha_is_one_half_at_the_start_with_the_papers_slope():
    bitune = attach(random_model("qwen2"), BituneSection(theta_init=0.01), seed=0)
    for what, theta in bitune.theta().items():
        assert bitune.alpha(what).tolist() == [0.5, 0.5]
        bitune.alpha(what).sum().backward()
        assert theta.grad.tolist() == pytest.approx([25.0, 25.0])  # 1 / (4 theta_init)


@pytest.mark.parametrize(("theta", "variant"), [(1e9, "no_mixing"), (0.0, "lora")])
def test_the_ends_of_theta_are_one_cache_or_the_other(theta, variant):
    bitune = tuned()
    with torch.no_grad():
        for value in bitune.theta().values():
            value.fill_(theta)
    actual = scores(bitune, EXAMPLES)
    assert (actual - scores(tuned(), EXAMPLES)).abs().max() > 0.01
    bitune.name, bitune.variant = variant, VARIANTS[variant]
    torch.testing.assert_close(actual, scores(bitune, EXAMPLES), atol=1e-5, rtol=1e-5)


def plain(model, example):
    ids = torch.tensor([example.prompt + example.answer])
    with torch.no_grad():
        return model(ids).logits[0, len(example.prompt) - 1 : -1]


@pytest.mark.parametrize("variant", ["only_causal", "lora"])
def test_fresh_adapters_in_causal_passes_are_the_plain_model(variant):
    bitune = attach(random_model("qwen2"), BituneSection(variant=variant), seed=0)
    expected = torch.cat([plain(random_model("qwen2"), example) for example in EXAMPLES])
    torch.testing.assert_close(scores(bitune, EXAMPLES), expected, atol=1e-5, rtol=1e-5)


# --- the whole formula, by hand -------------------------------------------------------------------


def rotated(x, positions, theta=10000.0):
    """(heads, T, d) with its pairs (i, i + d / 2) turned by position times frequency."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin, a, b = angles.cos(), angles.sin(), x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class ByHand:
    """Two passes, mixed caches and an answer, of one example, from weights alone."""

    def __init__(self, model, bitune):
        self.base = {name: value.detach() for name, value in model.state_dict().items()}
        self.heads, self.width, self.groups = 4, 8, 2
        self.adapters = {
            name.removeprefix("model.base_model.model."): value.detach()
            for name, value in bitune.named_parameters()
            if prefill.OF_ADAPTER.search(name)
        }

    def linear(self, name, kind, x):
        out = x @ self.base[f"{name}.weight"].T
        if f"{name}.bias" in self.base:
            out = out + self.base[f"{name}.bias"]
        a, b = (self.adapters[f"{name}.lora_{half}.{kind}.weight"] for half in "AB")
        return out + (x @ a.T @ b.T) * (ALPHA / RANK)

    def norm(self, name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.base[f"{name}.weight"]

    def run(self, ids, kind, start, sees, cache=None):
        """Final states and each layer's (K, V); sees: (T, S) True where a key is seen."""
        positions = torch.arange(start, start + len(ids))
        x, kept = self.base["model.embed_tokens.weight"][ids], []
        for number in range(2):
            at = f"model.layers.{number}"
            y = self.norm(f"{at}.input_layernorm", x)
            q, k, v = (
                self.linear(f"{at}.self_attn.{n}_proj", kind, y)
                .view(len(ids), -1, self.width)
                .transpose(0, 1)
                for n in "qkv"
            )
            q, k = rotated(q, positions), rotated(k, positions)
            if cache is not None:
                k, v = torch.cat((cache[number][0], k), 1), torch.cat((cache[number][1], v), 1)
            kept.append((k, v))
            k, v = (item.repeat_interleave(self.heads // self.groups, 0) for item in (k, v))
            seen = (q @ k.transpose(1, 2) / math.sqrt(self.width)).masked_fill(~sees, -math.inf)
            mixed = (seen.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), -1)
            x = x + self.linear(f"{at}.self_attn.o_proj", kind, mixed)
            y = self.norm(f"{at}.post_attention_layernorm", x)
            gate, up = (self.linear(f"{at}.mlp.{n}_proj", kind, y) for n in ("gate", "up"))
            x = x + self.linear(f"{at}.mlp.down_proj", kind, silu(gate) * up)
        return self.norm("model.norm", x), kept

    def logits(self, example, alpha_k, alpha_v, second):
        *prompt, last = example.prompt
        size, answer = len(prompt), [last, *example.answer[:-1]]
        ones = torch.ones(size, size, dtype=torch.bool)
        masks = {"causal": ones.tril(), "bidirectional": ones, "anticausal": ones.triu()}
        _, first = self.run(prompt, CAUSAL, 0, masks["causal"])
        _, other = self.run(prompt, BIDIRECTIONAL, 0, masks[second])
        cache = [
            (
                (1 - alpha_k[n]) * first[n][0] + alpha_k[n] * other[n][0],
                (1 - alpha_v[n]) * first[n][1] + alpha_v[n] * other[n][1],
            )
            for n in range(2)
        ]
        sees = torch.ones(len(answer), size + len(answer), dtype=torch.bool).tril(size)
        states, _ = self.run(answer, CAUSAL, size, sees, cache)
        return states @ self.base["lm_head.weight"].T


@pytest.mark.parametrize("variant", ["full", "only_causal", "anticausal"])
def test_the_whole_method_is_the_formula(variant):
    model = random_model("qwen2", tie_word_embeddings=False)
    bitune = tuned(variant, tie_word_embeddings=False)
    hand = ByHand(model, bitune)
    init = 0.01
    alpha = {
        what: [abs(item) / (init + abs(item)) for item in theta.tolist()]
        for what, theta in bitune.theta().items()
    }
    for example in EXAMPLES[:2]:
        expected = hand.logits(example, alpha["keys"], alpha["values"], VARIANTS[variant].second)
        torch.testing.assert_close(scores(bitune, [example]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3", "gemma2"])
def test_ragged_prompts_in_one_batch_are_as_one_at_a_time(family, variant):
    bitune = tuned(variant, family)
    alone = torch.cat([scores(bitune, [example]) for example in EXAMPLES])
    torch.testing.assert_close(scores(bitune, EXAMPLES), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["full", "naive"])
def test_a_second_reading_with_the_sink_kept(variant):
    """The first token's values are the causal pass's, those between it and the last are not."""
    settings = BituneSection(variant=variant, rank=2, keep_sink=True)
    bitune = attach(random_model("llama"), settings, seed=0)
    ids = torch.tensor([[0, 0, 5, 6, 7], [11, 12, 13, 14, 15]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    kind = BIDIRECTIONAL if bitune.variant.own else CAUSAL
    with torch.no_grad():
        first, second = (
            bitune._pass(name, ids, mask, attention).layers[-1]
            for name, attention in ((CAUSAL, "causal"), (kind, "bidirectional"))
        )
        [own] = [bitune._pass(kind, ids[:1, 2:], mask[:1, 2:], "bidirectional").layers[-1].values]
    for row, start in ((0, 2), (1, 0)):
        assert torch.equal(first.values[row, :, start], second.values[row, :, start])
        moved = (first.values - second.values)[row, :, start + 1 : -1].abs().amax((0, 2))
        assert moved.min() > 1e-3
    torch.testing.assert_close(second.values[:1, :, 2:], own, atol=1e-5, rtol=1e-4)


def test_the_variants_differ():
    actual = [scores(tuned(variant), EXAMPLES[:2]) for variant in VARIANTS]
    for number, one in enumerate(actual):
        for other in actual[number + 1 :]:
            assert (one - other).abs().max() > 1e-3


# --- what trains ----------------------------------------------------------------------------------


def exact_norm(module, x):
    return module.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_gradients_are_those_of_finite_differences():
    bitune = tuned(theta_init=1.0).double()  # so that a step of 1e-3 is small beside theta, too
    for module in bitune.modules():
        if isinstance(module, Qwen2RMSNorm):  # the library's computes in float32: noise here
            module.forward = partial(exact_norm, module)
    inputs = batch(EXAMPLES)
    mean_loss(*bitune(**inputs)).backward()
    checked = set()
    generator = torch.Generator().manual_seed(3)
    for name, value in bitune.named_parameters():
        if not value.requires_grad:
            continue
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            value.add_(direction, alpha=STEP)
            above = mean_loss(*bitune(**inputs))
            value.sub_(direction, alpha=2 * STEP)
            below = mean_loss(*bitune(**inputs))
            value.add_(direction, alpha=STEP)
        expected = ((above - below) / (2 * STEP)).item()
        actual = (value.grad * direction).sum().item()
        assert actual == pytest.approx(expected, rel=1e-2, abs=1e-6), name
        kind = prefill.OF_ADAPTER.search(name)
        checked.add(kind[1] if kind else name)
    assert checked == {CAUSAL, BIDIRECTIONAL, "theta_keys", "theta_values"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_what_an_answer_depends_on_trains(variant):
    bitune = attach(random_model("qwen2"), BituneSection(variant=variant), seed=0)
    trains = {name for name, value in bitune.named_parameters() if value.requires_grad}
    assert all(name.startswith("theta_") or prefill.OF_ADAPTER.search(name) for name in trains)
    assert ("theta_keys" in trains) == ("theta_values" in trains) == VARIANTS[variant].mixed
    last = {name for name in trains if ".layers.1." in name and f".{BIDIRECTIONAL}." in name}
    used = {name.split(".")[name.split(".").index("1") + 2] for name in last}
    assert used == ({"k_proj", "v_proj"} if VARIANTS[variant].own else set())
    mean_loss(*bitune(**batch(EXAMPLES))).backward()
    for name, value in bitune.named_parameters():
        assert (value.grad is not None) == (name in trains), name


# --- generation -----------------------------------------------------------------------------------


def whole_prompts():
    rows = [example.prompt for example in EXAMPLES]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def recomputed(bitune, prompt, count):
    """Greedy tokens, with everything computed anew for every token."""
    said = []
    for _ in range(count):
        # the label of the token to come does not matter: its logits are asked for
        said.append(scores(bitune, [Example(prompt, [*said, 0])])[-1].argmax().item())
    return said


def test_cached_decoding_is_recomputing():
    bitune = tuned()
    keys = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    actual = bitune.generate(*whole_prompts(), **keys)[:, -6:].tolist()
    assert actual == [recomputed(bitune, example.prompt, 6) for example in EXAMPLES]


def test_beams_and_samples_are_as_one_prompt_at_a_time():
    bitune = tuned()
    ids, mask = whole_prompts()
    keys = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    beams = bitune.generate(ids, mask, num_beams=3, do_sample=False, **keys)[:, -5:]
    for row, example in enumerate(EXAMPLES):
        one = torch.tensor([example.prompt])
        alone = bitune.generate(one, torch.ones_like(one), num_beams=3, do_sample=False, **keys)
        assert beams[row].tolist() == alone[0, -5:].tolist()
    settings = GenerationConfig(num_beams=3, do_sample=False, **keys)
    said = bitune.generate(ids, mask, generation_config=settings)
    assert said[:, -5:].tolist() == beams.tolist()
    torch.manual_seed(0)
    several = bitune.generate(ids, mask, do_sample=True, num_return_sequences=3, **keys)
    torch.manual_seed(0)
    again = bitune.generate(ids, mask, do_sample=True, num_return_sequences=3, **keys)
    assert several.shape == (12, ids.shape[1] + 5) and torch.equal(several, again)


@pytest.mark.parametrize("variant", ["full", "no_mixing", "shared_weights", "lora"])
def test_merged_for_decoding_it_says_the_same(variant):
    bitune = tuned(variant)
    expected = scores(bitune, EXAMPLES)
    after = prefill.merged(bitune)
    torch.testing.assert_close(scores(after, EXAMPLES), expected, atol=1e-4, rtol=1e-4)
    if after.reader is not None:  # no weight is held twice
        dense = {name.replace("base_layer.", "") for name, _ in after.decoder.named_parameters()}
        both = {value.data_ptr() for value in after.parameters()}
        adapters = sum("lora_" in name for name, _ in after.reader.named_parameters())
        assert len(both) == len(dense) + adapters + len(after.theta())
    keys = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said = after.generate(*whole_prompts(), **keys)[:, -4:].tolist()
    assert said == [recomputed(after, example.prompt, 4) for example in EXAMPLES]


# --- files and refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "Question: {prompt}\n\nAnswer:"])
def test_the_code_of_the_card_answers_and_names_no_path(tiny_path, tmp_path, monkeypatch, template):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    folder, keys = tmp_path / "bitune", {"vocab_size": len(tokenizer)}
    monkeypatch.chdir(tmp_path)
    config = load_config(None, [f"model.name={tiny_path}"])
    config = config.model_copy(
        update={"bitune": config.bitune.model_copy(update={"template": template})}
    )
    saving.save(tuned(**keys), tokenizer, template, folder)
    saving.write_card(folder, config, {"tasks": {}, "metrics": {}, "perplexity": 2.0})
    card = (folder / "README.md").read_text()
    assert str(tiny_path) not in card and "More Information Needed" not in card
    monkeypatch.setattr(ubmoe, "load", lambda name: random_model("qwen2", **keys))
    monkeypatch.chdir(folder)
    [code] = re.findall(r"```python\n(.*?)```", card, re.S)
    names = {}
    exec(code, names)
    assert "live" in names["answer"]  # the question is in it


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_it_is_the_same(tiny_path, tmp_path, variant):
    bitune = tuned(variant)
    expected = scores(bitune, EXAMPLES)
    bitune.decoder.name_or_path = str(tmp_path)  # a folder of this machine
    saving.save(bitune, AutoTokenizer.from_pretrained(tiny_path), None, tmp_path / "bitune")
    for path in (tmp_path / "bitune").rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path
    again = saving.load(random_model("qwen2"), tmp_path / "bitune")
    assert torch.equal(scores(again, EXAMPLES), expected)
    assert not any(value.requires_grad for value in again.parameters())


def test_an_adapter_that_lacks_a_layer_is_refused(tiny_path, tmp_path):
    saving.save(tuned(), AutoTokenizer.from_pretrained(tiny_path), None, tmp_path / "bitune")
    path = tmp_path / "bitune" / CAUSAL / "adapter_model.safetensors"
    save_file({n: v for n, v in load_file(path).items() if ".layers.1." not in n}, path)
    with pytest.raises(UserError, match="no Bitune model of .*missing adapter keys"):
        saving.load(random_model("qwen2"), tmp_path / "bitune")


def test_another_model_or_no_directory_is_refused(tiny_path, tmp_path):
    with pytest.raises(UserError) as caught:
        saving.load(random_model("qwen2"), tmp_path / "none")
    expected = "expected the directory that python -m ubmoe.bitune saved"
    assert str(caught.value) == f"{tmp_path}/none has no bitune.json; {expected}"
    saving.save(tuned(), AutoTokenizer.from_pretrained(tiny_path), None, tmp_path / "bitune")
    with pytest.raises(UserError, match="no Bitune model of"):
        saving.load(random_model("qwen2", hidden_size=16), tmp_path / "bitune")
    other = random_model("qwen2")
    other.model.norm.weight.data += 0.1
    with pytest.raises(UserError, match="trained on other weights of the same shape"):
        saving.load(other, tmp_path / "bitune")


@pytest.mark.parametrize("adapter", ["dora", "ia3"])
def test_other_adapters_learn_too_and_cannot_be_merged(adapter):
    bitune = attach(random_model("qwen2"), BituneSection(adapter=adapter), seed=0)
    before = copy.deepcopy(
        {name: value for name, value in bitune.named_parameters() if not value.requires_grad}
    )
    trains = [value for value in bitune.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trains, 1e-2)
    first = loss(bitune, EXAMPLES).item()
    for _ in range(8):
        loss(bitune, EXAMPLES).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(bitune, EXAMPLES).item() < first
    for name, value in bitune.named_parameters():
        assert value.requires_grad or torch.equal(value, before[name]), name
    with pytest.raises(UserError, match="only lora can be merged"):
        prefill.merged(bitune)


def test_a_decoder_without_keys_and_values_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=40))
    with pytest.raises(UserError, match="read left to right"):
        attach(model, BituneSection(), seed=0)
    with pytest.raises(UserError, match="expected attention in every layer"):
        attach(model, BituneSection(variant="only_causal"), seed=0)


def test_no_layers_may_be_bidirectional_and_wrong_ones_are_blamed_on_their_own_key():
    model = random_model("qwen2")
    with pytest.raises(UserError, match=r"bitune.layers: got \[99\]"):
        attach(model, BituneSection(layers=[99]), seed=0)
    none = attach(random_model("qwen2"), BituneSection(layers="none"), seed=0)
    assert none.decoder.config.bidirectional_layers == []
