"""Which layers may look both ways: every pattern of them on the same sentence pairs, untrained."""
