"""A causal language model tuned into a sentence encoder, stage by stage (train_bi.py)."""
