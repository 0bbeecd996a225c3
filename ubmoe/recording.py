"""A run as one JSON with its figures and its models, whole or not at all.

Nothing heavy is imported at the top: an output directory that cannot be written is said at once.
"""

import logging
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ubmoe import endings, owned
from ubmoe.cli import is_first_process
from ubmoe.config import Config, dump_config
from ubmoe.data.bad_rows import dropping
from ubmoe.data.inputs import inputs
from ubmoe.data.plain import noting
from ubmoe.data.templates import dated
from ubmoe.files import json_text, make_writable, save_figure, write_text
from ubmoe.staging import move_into_place, staging, unfinished_of
from ubmoe.unfinished import check as check_partial
from ubmoe.unfinished import remove as remove_partial

log = logging.getLogger(__name__)
PACKAGES = (
    "ubmoe",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "peft",
    "numpy",
)
# Of git, seen from this package: it and the scripts; a study that records its runs changes neither.
CODE = (".", ":(top,glob)*.py")
PARTIAL = re.compile(r"\w+\.partial-\d+(?P<of>-of-\d+)?\.npz", re.ASCII)  # of an interrupted run
WORKING = ("stage.json", "checkpoint-[0-9]*", "adapter")  # in a folder of checkpoints


@dataclass
class Run:
    """The record that a script fills in while it runs; written when it ends well.

    unfinished: where the first process writes, and all may read, until all is there. inputs:
    digests of what was read, taken before it was.
    """

    program: str
    name: str
    config: Config
    directory: Path
    unfinished: Path
    started: float = field(default_factory=time.monotonic)
    model: Any = None
    section: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)  # further sections of the result
    figures: dict[str, Any] = field(default_factory=dict)  # file name -> matplotlib figure
    inputs: dict[str, str | None] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.directory / f"{self.name}.json"

    @property
    def is_main(self) -> bool:
        """Whether this process writes and scores; under torchrun only the first one does."""
        from accelerate import PartialState

        return PartialState().is_main_process

    def place(self, name: str) -> Path:
        """Where to write, and read, a model that is `<output_dir>/<name>` once the run is whole."""
        return self.unfinished / name

    def partial(self, number: int = 0) -> Path:
        """A file that keeps a part of the result until the run is whole; that of an earlier run is
        there under `resume: auto` alone.
        """
        path = self.directory / f"{self.name}.partial-{number}.npz"
        if self.config.resume != "auto":
            remove_partial(path)
        return path

    def log(self, message: str, *values: object) -> None:
        """A line for the people who watch the run."""
        log.info(message, *values)

    def say_the_end(self, made: Sequence[str]) -> None:
        """The scores, and every folder and file of the run."""
        for line in endings.scores(self.name, {self.name: self.section} | self.more):
            self.log("%s", line)
        names = [*made, *sorted(self.figures)]
        self.log("%s", endings.written(self.directory, [*names, self.path.name]))

    def write(self) -> None:
        """The resolved config, the figures and the result, and all of the run into its place."""
        late = inputs(self.config, self.name) if None in self.inputs.values() else {}
        record = {
            "config": self.config.model_dump(),
            "inputs": late
            | {key: digest for key, digest in self.inputs.items() if digest is not None},
            "environment": environment(self.model, self.config.seed),
            "seconds": round(time.monotonic() - self.started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            self.name: self.section,
            **self.more,
        }
        text = json_text(record)  # fails before anything is written
        write_text(self.place(f"{self.program}.config.yaml"), dump_config(self.config))
        for name, figure in self.figures.items():
            save_figure(figure, self.place(name))
        write_text(self.place(self.path.name), text)
        move_into_place(self.unfinished)
        for leftover in self.directory.glob(f"{self.name}.partial-*"):
            if PARTIAL.fullmatch(leftover.name):
                remove_partial(leftover)


@contextmanager
def recording(
    program: str, name: str, config: Config, *made: str, working: Sequence[str] = ()
) -> Iterator[Run]:
    """A run that writes `<output_dir>/<name>.json` when its body ends well, on the main process.

    made: models and figures that it will leave, too. working: folders of what it goes on from. Bad
    rows are errors in it, or dropped and counted in the result, as `data.skip_bad_rows` says.
    Raises UserError at once for an output directory that cannot be written, in which the program
    already runs, or where something that is not ours would give way; a failed run leaves earlier
    results and models as they were.
    """
    directory = Path(config.output_dir)
    for place in (*made, f"{name}.json", f"{program}.config.yaml"):
        owned.check(directory / place)
    for path in directory.glob(f"{name}.partial-*"):
        if (match := PARTIAL.fullmatch(path.name)) and match["of"] is None:  # as Run.partial's
            check_partial(path)
    for place in working:
        owned.check_within(directory / Path(place).parts[0])  # no link
        owned.check_within(directory / place, *WORKING)
    new = make_writable(directory)
    there = nullcontext(unfinished_of(directory, program))
    staged = staging(directory, program) if is_first_process() else there
    try:
        with (
            staged as unfinished,
            dropping(config.data.skip_bad_rows) as dropped,
            noting() as noted,
            dated(config.data.template_date),
        ):
            run = Run(program, name, config, directory, unfinished)
            run.inputs = inputs(config, name) if is_first_process() else {}
            yield run
            if config.data.skip_bad_rows:
                run.log("%d rows dropped, which cannot be used", len(dropped))
                run.more["skipped_rows"] = len(dropped)
            run.more |= noted
            if run.is_main:
                # What an earlier run left under such a name is not this one's.
                models = [name for name in made if run.place(name).exists()]
                run.write()
                run.say_the_end(models)
                if config.hub.push is not None:
                    from ubmoe.models import hub

                    folders = [directory / name for name in made if name in hub.NAMES]
                    hub.push(config.hub, [folder for folder in folders if folder.is_dir()])
    except BaseException:
        for folder in new:  # deepest first; what holds the sums of an interrupted run stays
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def environment(model: Any, seed: int) -> dict[str, Any]:
    """Versions, device, dtype, commit and seed: what a number depends on besides its config."""
    from ubmoe.models.loading import environment as of_model

    return {
        "python": platform.python_version(),
        "packages": {name: release for name in PACKAGES if (release := _version(name))},
        "platform": f"{platform.system()} {platform.machine()}",
        "git_commit": git_commit(),
        "seeds": [seed],
        **of_model(model),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of this package's checkout, `+changes` where edited; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", *CODE],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def peak_memory_bytes() -> int:
    """Most memory of this process: allocated on CUDA, resident set on CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:  # ru_maxrss of a child begins at what its parent had; VmHWM is the process's own
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
