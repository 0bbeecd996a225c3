"""Word-level probing, after Feng et al. (python -m ubmoe.probing)."""
