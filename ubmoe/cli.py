"""The command line of every program, `program [CONFIG] [key=value ...]`, and its way to fail."""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

try:  # every program imports this module first
    from ubmoe.bounds import naming
    from ubmoe.config import (
        Config,
        UserError,
        dump_config,
        error_reason,
        help_text,
        load_config,
        shown,
    )
except KeyboardInterrupt:  # before anything was begun
    sys.exit(130)

# How Python, torch's CPU allocator, and CUDA before accelerate is there, say it.
NO_MEMORY = ("MemoryError", "OutOfMemoryError", "out of memory", "can't allocate memory")
# How Python, safetensors and torch's zip writer say it; a quota and a limit of the shell, too.
NO_SPACE = (
    *("No space left on device", "PytorchStreamWriter failed writing", "unexpected pos"),
    *("Disk quota exceeded", "File too large"),
)
log = logging.getLogger(__name__)
Program = Callable[[Config], Path | str | None]
INTERRUPTED = 130
SHOW = "--show-config"
LIFELINE = "UBMOE_LIFELINE"  # set where stdin is a pipe that ends with the process that began this
WAIT = 3.0  # seconds in which torchrun ends the other processes when the first one failed


def run(
    name: str,
    purpose: str,
    main: Program | Mapping[str, Program],
    dry_run: Program | None = None,
    lower: str = "the batch size",
) -> None:
    """Parse sys.argv, run `main`, print what it returns as the last line, and exit.

    main: the program; or several by the word that comes first. dry_run: what it would do. lower:
    the keys to lower when memory runs out. Exit status 0; 2 with one line on stderr for a
    UserError, a full disk or missing memory; 130 after Ctrl-C.
    """
    if os.environ.pop(LIFELINE, None):
        Thread(target=_end_with_parent, daemon=True).start()
    with in_one_line(lower):
        logging.basicConfig(stream=sys.stderr, format="%(message)s")
        logging.getLogger("ubmoe").setLevel(logging.INFO)
        logging.getLogger("huggingface_hub").propagate = False  # it prints its lines itself
        _check_environment()
        arguments = sys.argv[1:]
        called = sys.argv[0] if sys.argv[0].startswith("ubmoe ") else name
        if {"-h", "--help"} & set(arguments):
            verbs = () if callable(main) else tuple(main)
            _say(help_text(name, purpose, verbs, "all" in arguments, called))
        else:
            last_line = _called(called, main, dry_run, arguments)
            if last_line is not None and is_first_process():
                _say(last_line)


def _say(text: object) -> None:
    with naming("stdout"):
        print(text, flush=True)


@contextmanager
def in_one_line(lower: str = "the batch size") -> Iterator[None]:
    """The body of a program: whatever ends it is said in one line, with an exit status."""
    _open_streams()
    try:
        yield
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
        if _is_out_of_memory(error):
            fail(f"out of memory: lower {lower}, or take a smaller dtype or model")
        if _says(error, NO_SPACE):
            place = getattr(error, "filename", "output_dir")
            fail(f"no space left for {place} or the cache; make some and add resume=auto")
        if type(error) is Exception:  # as the tokenizers' library raises; ours never do
            fail(f"model.name: its tokenizer, or another library, fails: {error_reason(error)}")
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        fail(f"model.name: its tokenizer fails ({error_reason(error)}); expected one that works")


PROCESSES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


OF_ACCELERATE = ("ACCELERATE_", "FSDP_")  # as ACCELERATE_MIXED_PRECISION


def _check_environment() -> None:
    """Raises UserError for variables of torchrun's that say no number, or do not fit together.

    Those by which accelerate would train otherwise than the configuration says are taken out.
    """
    os.environ["MPLBACKEND"] = "agg"  # pictures are written, whatever a shell may show
    for name in [name for name in os.environ if name.startswith(OF_ACCELERATE)]:
        value = os.environ.pop(name)
        if value.lower() not in ("", "0", "no", "false"):
            log.warning(
                "%s=%s: ignored; the configuration alone says how a run trains", name, value
            )
    given = {name: os.environ[name] for name in PROCESSES if name in os.environ}
    size = given.get("WORLD_SIZE", "1")
    for name, value in given.items():
        is_number = re.fullmatch("[0-9]{1,6}", value) and re.fullmatch("[0-9]{1,6}", size)
        least = int("SIZE" in name)
        if not is_number or not least <= int(value) < int(size) + least:
            os.environ["RANK"] = "0"  # to say it
            raise UserError(
                f"{name}: got {shown(value)} in the environment, of WORLD_SIZE {size}; expected "
                "what torchrun sets, or none of them"
            )
    if int(size) > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            f"WORLD_SIZE: got {size} in the environment, without RANK, MASTER_ADDR or MASTER_PORT; "
            "expected what torchrun sets, or none of them"
        )
    if "MASTER_ADDR" not in os.environ:  # else what another program left would be waited for
        for name in given:
            del os.environ[name]


def _end_with_parent() -> None:
    """A program that a study runs must end when the study is killed."""
    os.read(0, 1)
    os._exit(INTERRUPTED)


def _open_streams() -> None:
    """Where the caller closed one: else a file of ours would get its number, and what it prints."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # open to the end


def _called(
    name: str,
    main: Program | Mapping[str, Program],
    dry_run: Program | None,
    arguments: list[str],
) -> Path | str | None:
    """The program's result, its dry run, or the whole configuration that it would have."""
    if not callable(main):
        verb = arguments[0] if arguments else ""
        if verb not in main:
            raise UserError(
                f"command line: got {repr(verb) if verb else 'nothing'} first; expected {name} "
                f"{'|'.join(main)} [CONFIG] [key=value ...]"
            )
        main, arguments = main[verb], arguments[1:]
    config = parse([argument for argument in arguments if argument != SHOW])
    if SHOW in arguments:
        return dump_config(config)
    if not config.dry_run:
        with naming(config.output_dir):
            return main(config)
    if dry_run is None:
        raise UserError(
            f"dry_run: {name} has none; expected false, or one of the three scripts or ubmoe.bitune"
        )
    return dry_run(config)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error means out of memory: accelerate's list of messages, and ours."""
    from accelerate.utils.memory import should_reduce_batch_size  # imports torch

    return _says(error, NO_MEMORY) or should_reduce_batch_size(error)


def _says(error: BaseException | None, words: tuple[str, ...]) -> bool:
    """Whether an error, or one that it was raised over, says one of these."""
    while error is not None:
        if any(word in f"{type(error).__name__} {error}" for word in words):
            return True
        error = error.__context__
    return False


def is_first_process() -> bool:
    """Under torchrun only the first of the processes speaks."""
    return os.environ.get("RANK", "0") == "0"


def in_one_process(name: str) -> None:
    """Raises UserError where torchrun has started several of a program that knows one."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{name} runs in one process; expected python -m ubmoe.{name}")


def parse(arguments: list[str]) -> Config:
    """[CONFIG] [key=value ...] -> Config. Raises UserError."""
    for text in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # how Python keeps such bytes
            raise UserError(f"command line: {ascii(text)} is not UTF-8; expected names that are")
    paths = [text for text in arguments if "=" not in text and not text.startswith("-")]
    if len(paths) > 1:
        raise UserError(
            f"command line: got {len(paths)} config files ({', '.join(paths)}), expected one; "
            "a key is given as key=value, such as seed=1"
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
    try:
        if not (who and status == INTERRUPTED):  # which all processes get at once
            print(f"error{who}: " + " ".join(message.split()), file=sys.stderr)
        sys.stderr.flush()
    except OSError:  # nobody reads it, and the status says it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    sys.exit(status)
