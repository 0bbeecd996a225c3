"""Shares of given queries and keys, by kernels and by blocks of rows, against loops and laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ubmoe.dependence import kernels, sums
from ubmoe.dependence.kernels import Texts, causal, parts_of
from ubmoe.dependence.shares import row_shares


def by_blocks(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    return row_shares(query[None], key[None], scaling)[0]


def capped(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    return row_shares(query[None], key[None], scaling, 5.0)[0]


def by_kernels(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    texts = Texts(torch.ones(1, query.shape[1], dtype=torch.long))
    return parts_of(query[None], key[None], None, scaling, texts).shares(texts)[0]


WAYS = [by_kernels, by_blocks, capped]


def loops(query: Tensor, key: Tensor, scaling: float) -> list[list[float]]:
    """The definition, one number at a time: (H, T, d), (K, T, d) -> the seven columns of each
    head.
    """
    heads, tokens, _ = query.shape
    result = []
    for head in range(heads):
        shares = [0.0] * 7
        for i in range(tokens):
            keys = key[head // (heads // len(key))]
            weights = [math.exp(float(query[head, i] @ keys[j]) * scaling) for j in range(tokens)]
            shares[3] += weights[0] / sum(weights) / tokens
            for j in range(tokens):
                place = (j > i) + (j != i)
                shares[place] += weights[j] / sum(weights) / tokens
                if j > 0:
                    shares[4 + place] += weights[j] / sum(weights[1:]) / tokens
        result.append(shares)
    return result


@pytest.mark.parametrize("way", WAYS[:2])
def test_shares_of_a_four_by_four_map_are_those_of_three_nested_loops(way):
    torch.manual_seed(1)
    query, key = torch.randn(4, 4, 8), torch.randn(2, 4, 8)
    expected = torch.tensor(loops(query, key, 0.7), dtype=torch.float64)
    torch.testing.assert_close(way(query, key, 0.7), expected, atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 150),
    st.sampled_from([0.0, 1.0, 30.0]),
    st.sampled_from(WAYS),
    st.integers(0, 99),
)
def test_shares_are_never_negative_and_sum_to_one(tokens, spread, way, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(4, tokens, 8, generator=generator) * spread
    key = torch.randn(2, tokens, 8, generator=generator)
    shares = way(query, key, 0.35)
    assert (shares >= 0).all()
    one = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(shares[:, :3].sum(-1), one, atol=1e-6, rtol=0)
    left = one * (tokens > 1)
    torch.testing.assert_close(shares[:, 4:].sum(-1), left, atol=1e-6, rtol=0)
    assert (shares[:, 3] <= shares[:, :2].sum(-1) + 1e-6).all()  # in before, or in main at its own


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("score", [-500.0, 0.0, 60.0, 500.0])
def test_what_is_left_without_the_first_key_does_not_drown_in_it(score, way):
    """Keys that are equal but for the first: the rest is uniform whatever the first one draws."""
    query, key = torch.ones(1, 40, 1), torch.zeros(1, 40, 1)
    key[0, 0] = score
    shares = way(query, key, 1.0)[0]
    even = sums.uniform([(40.0,)])["without_first"]
    expected = torch.tensor(list(even.values()), dtype=torch.float64) / 100
    torch.testing.assert_close(shares[4:], expected, atol=1e-6, rtol=0)
    weight = 1 / (1 + 39 * math.exp(-score)) if score > -400 else 0.0
    assert shares[3] == pytest.approx(weight, abs=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 3, 100])
def test_kernels_and_blocks_give_the_same(tokens):
    query, key = torch.randn(4, tokens, 16) * 3, torch.randn(2, tokens, 16)
    expected = by_blocks(query, key, 0.5)
    torch.testing.assert_close(by_kernels(query, key, 0.5), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_fp32_whatever_the_dtype(dtype):
    """To the last bit by blocks; a kernel's exponentials are a little coarser in half precision."""
    query, key = torch.randn(4, 200, 8).to(dtype), torch.randn(2, 200, 8).to(dtype)
    expected = by_blocks(query.float(), key.float(), 0.35)
    torch.testing.assert_close(by_blocks(query, key, 0.35), expected, atol=0, rtol=0)
    torch.testing.assert_close(by_kernels(query, key, 0.35), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 60])
def test_the_parts_make_the_flow(tokens, bidirectional):
    query, key, value = (torch.randn(2, heads, tokens, 8) for heads in (4, 2, 2))
    texts = Texts(torch.ones(2, tokens, dtype=torch.long))
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.4
    if not bidirectional:
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    actual = parts_of(query, key, value, 0.4, texts, bidirectional).flow(value)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_a_gpus_kernels_take_what_they_are_given(monkeypatch, dtype, capability):
    """Their own checks of shapes and types, without a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        query, key, odd = (
            torch.empty(2, heads, 299, size, dtype=dtype, device="cuda")
            for heads, size in ((14, 64), (2, 64), (2, 60))
        )
        mixed, log = causal(query, key, key, 0.1)
        assert kernels.computed_here(query) and not kernels.computed_here(odd)
        assert mixed.shape == query.shape and mixed.dtype == dtype
        assert log.shape == query.shape[:3] and log.dtype == torch.float32
