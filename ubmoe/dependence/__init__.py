"""Attention dependence DP: where each token's attention would go, if nothing were masked."""

SHARES = ("main", "before", "after")
