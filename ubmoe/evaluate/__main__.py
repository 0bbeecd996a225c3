"""Score any model."""

from ubmoe import cli
from ubmoe.evaluate.sts import main

if __name__ == "__main__":
    purpose = (
        "Score a directory or hub id on STS tasks and, with evaluation.language_model=true, on "
        "generation tasks."
    )
    cli.run("python -m ubmoe.evaluate", purpose, main)
