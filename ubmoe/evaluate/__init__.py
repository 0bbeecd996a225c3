"""STS by mteb and generation by lm-eval (python -m ubmoe.evaluate)."""
