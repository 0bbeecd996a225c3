"""Bitune: the prompt read twice, the caches mixed (python -m ubmoe.bitune)."""
