"""Recorded runs and the paper's tables."""

from ubmoe import cli
from ubmoe.recording import main

if __name__ == "__main__":
    purpose = "Tables of a run and of the paper; plan, run and draw the study; records; downloads."
    cli.run("python -m ubmoe.results", purpose, main)
