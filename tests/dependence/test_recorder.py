"""The dependence of one forward: against loops, against materialised maps, and against laws."""

import pytest
import torch
from builders import random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ubmoe.bidirectional import set_attention
from ubmoe.config import UserError
from ubmoe.dependence import SHARES, recorder, sums
from ubmoe.dependence.recorder import (
    Recorder,
    attention_layers,
    dependence_of,
    mean_attention,
    observed,
)
from ubmoe.dependence.shares import ROWS, unmasked_attention

PLAIN = ["qwen2", "qwen3", "llama", "mistral", "gemma"]
LENGTHS = [1, 2, 7, ROWS, 300]


class Reference:
    """A materialised recorder: eager attention, and the shares of the whole unmasked softmax."""

    def __init__(self) -> None:
        self.shares: list[Tensor] = []

    def __call__(self, module, query, key, value, attention_mask, scaling, softcap=None, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        full = scores.double().softmax(-1)  # (B, H, T, T)
        left = scores.double().clone()
        left[..., 0] = float("-inf")
        left = left.softmax(-1).nan_to_num()  # of one token nothing is left
        columns = [
            part
            for weights in (full, left)
            for part in (weights * torch.eye(full.shape[-1]), weights.tril(-1), weights.triu(1))
        ]
        columns.insert(3, full[..., :1])
        self.shares.append(torch.stack([part.sum(-1).mean(-1) for part in columns], -1))
        if attention_mask is not None:  # None: all is seen
            scores = scores + attention_mask
        output = scores.softmax(-1) @ value
        return output.transpose(1, 2).contiguous(), None


@torch.no_grad()
def reference(model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """((B, L, H, 7), logits) of unpadded texts by full maps."""
    way = Reference()
    AttentionInterface.register("reference", way)
    AttentionMaskInterface.register("reference", eager_mask)
    own = model.config._attn_implementation
    model.set_attn_implementation("reference")
    logits = model(ids, use_cache=False).logits
    model.set_attn_implementation(own)
    return torch.stack(way.shares, 1), logits


def ours(model, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with observed(model) as recorder:
        return dependence_of(model, recorder, ids, torch.ones_like(ids) if mask is None else mask)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("family", [*PLAIN, "gemma2", "gemma3_text"])
def test_every_text_layer_and_head_equals_the_materialised_reference(family, bidirectional, tokens):
    model = set_attention(random_model(family), bidirectional)
    ids = torch.randint(97, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    expected, _ = reference(model, ids)
    torch.testing.assert_close(ours(model, ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [*PLAIN, "gemma2", "gemma3_text", "gpt_oss", "nemotron"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_probe_leaves_the_models_logits_as_they_are(family, bidirectional):
    sizes = {"num_local_experts": 4, "sliding_window": 16} if family == "gpt_oss" else {}
    model = random_model(family, **sizes)
    model.config.is_causal = not bidirectional
    ids = torch.randint(97, (2, 90))  # longer than the window of 16, and than one block
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, use_cache=False).logits
        with observed(model) as recorder:
            logits = model(ids, use_cache=False).logits
    assert len(recorder.shares) == attention_layers(model) == 2
    scale = expected.abs().max()
    torch.testing.assert_close(logits / scale, expected / scale, atol=1e-5, rtol=0)


def test_the_bidirectional_flow_observes_other_states_than_the_causal_one():
    model, ids = random_model("qwen2"), torch.randint(97, (1, 30))
    causal = ours(model, ids)
    model.config.is_causal = False
    bidirectional = ours(model, ids)
    torch.testing.assert_close(
        causal[:, 0], bidirectional[:, 0]
    )  # the first layer sees no attention yet
    assert (causal[:, 1] - bidirectional[:, 1]).abs().max() > 1e-3


def test_a_text_of_one_token_depends_on_itself_alone():
    row = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    expected = torch.tensor(row, dtype=torch.float64).expand(1, 2, 4, 7)
    torch.testing.assert_close(ours(random_model("qwen2"), torch.tensor([[5]])), expected)


@pytest.mark.parametrize("tokens", [2, 7, 100])
def test_without_queries_and_keys_attention_is_uniform(tokens):
    model = random_model("qwen2")
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.zeros_(projection.weight)
            torch.nn.init.zeros_(projection.bias)
    even = sums.uniform([(float(tokens),)])
    row = [*(even[share] for share in SHARES), even["first"], *even["without_first"].values()]
    expected = torch.tensor(row, dtype=torch.float64).expand(1, 2, 4, 7) / 100
    torch.testing.assert_close(
        ours(model, torch.randint(97, (1, tokens))), expected, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_each_text_gives_alone(family, side):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if family == "gpt2" else {}
    model = random_model(family, **sizes)
    texts = [torch.randint(97, (length,)) for length in (70, 33, 1)]
    ids, mask = torch.zeros(3, 70, dtype=torch.long), torch.zeros(3, 70, dtype=torch.long)
    for row, text in enumerate(texts):
        real = slice(70 - len(text), 70) if side == "left" else slice(0, len(text))
        ids[row, real], mask[row, real] = text, 1
    together = ours(model, ids, mask)
    for row, text in enumerate(texts):
        torch.testing.assert_close(together[row], ours(model, text[None])[0], atol=1e-5, rtol=0)


# --- whole batches --------------------------------------------------------------------------------

FLOWS = [*PLAIN, "gemma2", "gemma3_text", "gpt_oss", "nemotron"]
MEMORY = [None, 1, 2**40]  # a processor's blocks; of a GPU small ones and a mask, and one for all


@pytest.mark.parametrize("family", FLOWS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("memory", MEMORY)
def test_whole_batches_are_measured_as_text_after_text(family, bidirectional, memory, monkeypatch):
    sizes = {"num_local_experts": 4, "sliding_window": 16} if family == "gpt_oss" else {}
    model = random_model(family, **sizes)
    model.config.is_causal = not bidirectional
    lengths = (90, 70, 33, 2, 1)
    ids, mask = torch.randint(97, (5, 90)), torch.ones(5, 90, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, length:] = 0
    item = [ours(model, row[None, :length]) for row, length in zip(ids, lengths, strict=True)]
    monkeypatch.setattr(recorder, "_spare", lambda device: memory)
    torch.testing.assert_close(ours(model, ids, mask), torch.cat(item), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("memory", MEMORY)
def test_where_no_kernel_computes_them_shares_go_by_blocks(monkeypatch, memory, tokens):
    monkeypatch.setattr(recorder, "_spare", lambda device: memory)
    monkeypatch.setattr(recorder, "computed_here", lambda query: False)
    monkeypatch.delattr(recorder, "parts_of")
    model = random_model("llama")
    ids = torch.randint(97, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    expected, _ = reference(model, ids)
    torch.testing.assert_close(ours(model, ids), expected, atol=1e-5, rtol=0)


def test_values_of_another_size_than_keys_are_followed_by_blocks_and_observed_by_kernels():
    query, key, value = torch.randn(1, 4, 90, 8), torch.randn(1, 2, 90, 8), torch.randn(1, 2, 90, 5)
    item = Recorder()
    output, _ = item(torch.nn.Module(), query, key, value, None, scaling=0.4, is_causal=True)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.4
    masked = scores.masked_fill(torch.ones(90, 90).triu(1).bool(), -torch.inf)
    expected = masked.softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(output.transpose(1, 2), expected)
    main = scores.softmax(-1).diagonal(dim1=2, dim2=3).mean(-1)
    torch.testing.assert_close(item.shares[0][..., 0].float(), main)


class Counted(TorchDispatchMode):
    """How many operations ran, and how many of them waited for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        self.waits += str(function).startswith(
            ("aten._local_scalar_dense", "aten.nonzero", "aten.item")
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma"])
def test_operations_of_a_layer_do_not_grow_with_the_length(padded, bidirectional, family):
    counts = {}
    for layers in (1, 3):
        for tokens in (40, 400):
            model = random_model(family, num_hidden_layers=layers)
            model.config.is_causal = not bidirectional
            ids, mask = torch.randint(97, (3, tokens)), torch.ones(3, tokens, dtype=torch.long)
            mask[1:, tokens - 9 :] = 1 - padded
            with observed(model) as item, Counted() as counted:
                dependence_of(model, item, ids, mask)
            counts[layers, tokens] = counted.operations
            assert counted.waits == 1  # whether all is finite, once a batch and at its end
    assert (counts[3, 40] - counts[1, 40]) / 2 <= 150
    assert (counts[1, 40], counts[3, 40]) == (counts[1, 400], counts[3, 400])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss"])
def test_windows_caps_and_sinks_wait_for_nothing(monkeypatch, family, bidirectional):
    monkeypatch.setattr(recorder, "_spare", lambda device: 2**40)
    sizes = {"num_local_experts": 4, "sliding_window": 16} if family == "gpt_oss" else {}
    model, ids = random_model(family, **sizes), torch.randint(97, (3, 90))
    model.config.is_causal = not bidirectional
    with observed(model) as item, Counted() as counted:
        dependence_of(model, item, ids, torch.ones_like(ids))
    assert counted.waits == 1


class NoSquare(TorchDispatchMode):
    """Fails on any tensor with two dimensions of at least `tokens`."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                large = sum(size >= self.tokens for size in tensor.shape)
                assert large < 2, f"{function} makes {tuple(tensor.shape)}"
        return output


@pytest.mark.parametrize("family", [*PLAIN, "gemma2", "gemma3_text"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_no_square_tensor_ever_exists(family, bidirectional, padded):
    model, tokens = random_model(family), 300
    model.config.is_causal = not bidirectional
    ids, mask = torch.randint(97, (2, tokens)), torch.ones(2, tokens, dtype=torch.long)
    if padded:
        ids, mask = torch.randint(97, (2, tokens + 9)), torch.ones(2, tokens + 9, dtype=torch.long)
        mask[0, tokens:] = 0
    with NoSquare(tokens):
        ours(model, ids, mask)


def test_the_guard_against_square_tensors_can_fail():
    model, ids = random_model("qwen2"), torch.randint(97, (1, 200))
    with pytest.raises(AssertionError, match="makes"), NoSquare(200):
        reference(model, ids)


def test_the_map_is_what_the_shares_are_taken_from():
    model, ids = random_model("qwen2"), [3, 1, 4, 1, 5]
    attention = mean_attention(model, ids).double()
    shares = ours(model, torch.tensor([ids])).mean((0, 1, 2))
    parts = torch.stack([attention.trace(), attention.tril(-1).sum(), attention.triu(1).sum()])
    torch.testing.assert_close(parts / len(ids), shares[:3], atol=1e-6, rtol=0)
    query, key = torch.randn(4, 5, 8), torch.randn(2, 5, 8)
    full = (query @ key.repeat_interleave(2, 0).transpose(1, 2) * 0.4).softmax(-1)
    torch.testing.assert_close(unmasked_attention(query, key, 0.4), full)


def test_the_models_own_attention_is_back_afterwards_even_after_an_error():
    model = random_model("qwen2")
    own = model.config._attn_implementation
    with pytest.raises(KeyError), observed(model):
        raise KeyError
    assert model.config._attn_implementation == own
    assert "dependence" not in str(model.config.to_dict())


def test_classes_outside_the_attention_interface_are_refused_by_name():
    with (
        pytest.raises(UserError, match="BloomForCausalLM does not use"),
        observed(random_model("bloom", n_layer=2, n_head=4)),
    ):
        pass


def test_a_probe_that_is_not_called_once_a_layer_is_an_error():
    model = random_model("qwen2")
    model.config.layer_types = ["full_attention"] * 3
    with pytest.raises(UserError, match="called the dependence recorder 2 times in 3 layers"):
        ours(model, torch.tensor([[1, 2, 3]]))


def test_overflow_in_half_precision_is_an_error_and_no_number():
    model, ids = random_model("qwen2").half(), torch.tensor([[1, 2, 3]])

    def overflow() -> None:
        model.model.embed_tokens.weight.data.fill_(6e4)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data.fill_(6e4)

    message = "overflows in torch.float16; expected model.dtype float32"
    with observed(model) as recorder, pytest.raises(UserError, match=message):
        overflow()  # in a text, and not in what is proved on loading
        dependence_of(model, recorder, ids, torch.ones_like(ids))
    with pytest.raises(UserError, match="not finite with none padding; expected .* model.dtype"):
        ours(model, ids)
