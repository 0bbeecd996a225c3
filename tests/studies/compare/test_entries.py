"""Rows of tables and their order."""

from studies.compare.entries import base_first


def test_untrained_rows_come_first_and_a_row_beside_its_causal_twin():
    ordered = ["base", "base causal", "base, layers from 11", "ffn", "ffn causal", "mntp"]
    ordered += ["ffn 20 steps", "ffn 20 steps causal", "mntp then simcse"]
    assert sorted(sorted(ordered, reverse=True), key=base_first) == ordered
