"""One program for all: measure, tune, join, tune by Bitune, probe, evaluate, and show results.

ubmoe encode configs/tiny.yaml
python -m ubmoe encode configs/tiny.yaml
"""

import runpy
import sys

COMMANDS = {
    "dp": ("calculate_dp", "measure attention dependence"),
    "encode": ("train_bi", "tune a language model into a sentence encoder"),
    "join": ("train_ubmoe", "join the model and its encoder into one checkpoint"),
    "evaluate": ("ubmoe.evaluate", "score an encoder, and what a language model still generates"),
    "results": ("ubmoe.results", "tables, plans, studies, downloads"),
    "bitune": ("ubmoe.bitune", "tune a model to read its prompt twice"),
    "probe": ("ubmoe.probing", "what word vectors know"),
    "scan": ("ubmoe.scan", "which layers may be bidirectional"),
    "swap": ("ubmoe.swap", "which layers' tuning costs the language model"),
    "shift": ("ubmoe.shift", "what the attention sink's fall costs it"),
    "fetch": ("ubmoe.fetch", "a model by name from the package index"),
}


def usage() -> str:
    """Every command in a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {said}" for name, (_, said) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ubmoe COMMAND [CONFIG] [key=value ...]",
            "",
            *lines,
            "",
            "ubmoe COMMAND --help shows the keys of a command. CONFIG is a YAML file, as",
            "configs/tiny.yaml: those of the repository are found wherever ubmoe is installed.",
        ]
    )


def main() -> None:
    """Run the command that comes first, as its own program. Exit status 2 for another word."""
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word in ("-h", "--help"):
        print(usage())
    elif word not in COMMANDS:
        print(f"error: ubmoe: got {word!r}; expected {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = [f"ubmoe {word}", *sys.argv[2:]]
        runpy.run_module(COMMANDS[word][0], run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
