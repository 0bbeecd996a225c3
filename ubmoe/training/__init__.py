"""Shared by every training run: trainers, checkpoints, sharding, losses."""
