"""What word vectors know, after Feng et al. (python -m ubmoe.probing)."""
