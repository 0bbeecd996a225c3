"""The mixture of the original and the tuned FFN, its routers, its files (train_ubmoe.py)."""
