"""The command line of every program, `program [CONFIG] [key=value ...]`, and its way to fail."""

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ubmoe.config import Config, UserError, help_text, load_config

# How Python, CUDA and torch's CPU allocator say it.
NO_MEMORY = ("MemoryError", "OutOfMemoryError", "out of memory", "can't allocate memory")
# How Python, safetensors and torch's zip writer say it.
NO_SPACE = ("No space left on device", "PytorchStreamWriter failed writing", "unexpected pos")
LOWER = {  # what to lower when memory runs out, by program
    "calculate_dp.py": "dependence.batch_tokens or dependence.max_tokens",
    "train_bi.py": "bi.stages.N.mini_batch_tokens (with bi.stages.N.cached=true)",
    "train_ubmoe.py": "ubmoe.per_device_train_batch_size, ubmoe.max_tokens or "
    "evaluation.batch_size",
    "python -m ubmoe.bitune": "bitune.per_device_train_batch_size, bitune.max_tokens or "
    "evaluation.batch_size",
    "python -m ubmoe.probing": "probing.batch_tokens",
    "python -m ubmoe.evaluate": "evaluation.batch_size",
}

DRY_RUN = ("calculate_dp.py", "train_bi.py", "train_ubmoe.py")
INTERRUPTED = 130
WAIT = 3.0  # seconds in which torchrun ends the other processes when the first one failed


def run(program: str, purpose: str, main: Callable[[Config], Path | str | None]) -> None:
    """Parse sys.argv, run `main`, print what it returns as the last line, and exit.

    Exit status 0; 2 with one line on stderr for a UserError, a full disk or missing memory; 130
    after Ctrl-C.
    """
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("ubmoe").setLevel(logging.INFO)
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(help_text(program, purpose))
        else:
            last_line = _called(program, main, parse(sys.argv[1:]))
            if last_line is not None and is_first_process():
                print(last_line)
        sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        # The reader (head, less) has gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(f"{error.filename or 'system'}: {error.strerror or error}")
    except KeyboardInterrupt:
        fail("interrupted; resume=auto goes on from what was complete", status=INTERRUPTED)
    except Exception as error:
        if _says(error, NO_MEMORY):
            lower = LOWER.get(program, "the batch size")
            fail(f"out of memory: lower {lower}, or take a smaller dtype or model")
        if _says(error, NO_SPACE):
            fail("no space left for output_dir or the cache; make some and add resume=auto")
        raise


def _called(
    program: str, main: Callable[[Config], Path | str | None], config: Config
) -> Path | str | None:
    """What a program returns, or what it would do."""
    if not config.dry_run:
        return main(config)
    if program not in DRY_RUN:
        raise UserError(
            f"dry_run: {program} has none; expected false, or one of {', '.join(DRY_RUN)}"
        )
    from ubmoe import dry_run

    return getattr(dry_run, program.removesuffix(".py"))(config)


def _says(error: BaseException | None, words: tuple[str, ...]) -> bool:
    """Whether an error, or one that it was raised over, says one of these."""
    while error is not None:
        if any(each in f"{type(error).__name__} {error}" for each in words):
            return True
        error = error.__context__
    return False


def is_first_process() -> bool:
    """Under torchrun only the first of the processes speaks."""
    return os.environ.get("RANK", "0") == "0"


def parse(arguments: list[str]) -> Config:
    """[CONFIG] [key=value ...] -> Config. Raises UserError."""
    paths = [text for text in arguments if "=" not in text and not text.startswith("-")]
    if len(paths) > 1:
        raise UserError(
            f"command line: got {len(paths)} config files ({', '.join(paths)}), expected one"
        )
    return load_config(
        paths[0] if paths else None, [text for text in arguments if text not in paths]
    )


def fail(message: str, status: int = 2) -> None:
    """One line on stderr, below any progress bar, then exit.

    Of several processes the first one says what all have met, and torchrun ends the others before
    they repeat it; what one of the others alone has met, it says itself.
    """
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()
    who = "" if is_first_process() else f" (process {os.environ['RANK']})"
    if who:
        time.sleep(WAIT)
    if not (who and status == INTERRUPTED):  # which all are told at once
        print(f"error{who}: " + " ".join(message.split()), file=sys.stderr)
    sys.stderr.flush()
    sys.exit(status)
