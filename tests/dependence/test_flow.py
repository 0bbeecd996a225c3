"""Attention that no one kernel computes."""

import torch

from ubmoe.dependence.flow import Rule, flow


def test_flow_with_unequal_head_sizes_equals_plain_softmax_attention():
    query, key, value = torch.randn(4, 90, 8), torch.randn(2, 90, 8), torch.randn(2, 90, 5)
    keys, values = key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
    scores = (query @ keys.transpose(1, 2) * 0.4).masked_fill(
        torch.ones(90, 90).triu(1).bool(), -torch.inf
    )
    expected = scores.softmax(-1) @ values
    torch.testing.assert_close(
        flow(query, key, value, Rule(0.4, causal=True), torch.ones(90).bool()), expected
    )
