"""Interventions without training: masks, layers or the attention sink of a model are exchanged."""
