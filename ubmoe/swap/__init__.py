"""Which layers' tuning costs the language model: one layer put in, or put back, at a time."""
