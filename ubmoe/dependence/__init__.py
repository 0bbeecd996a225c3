"""Attention dependence DP: where each token's attention would go, if nothing were masked."""

SHARES = ("main", "before", "after")
# The columns of a row: the paper's triple; the share of the text's first token, where attention
# that has nowhere to go is often sunk; and the triple with that key left out of every row.
COLUMNS = (*SHARES, "first", *(f"without_first.{share}" for share in SHARES))
