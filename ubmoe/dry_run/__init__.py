"""Dry runs: steps, memory and files of a program, without running it."""
