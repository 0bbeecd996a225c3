"""The embedded model `tiny`: tokenizer and Qwen2 of about a million parameters, made on the spot.

It is a true language model of the language in language.py. It is built once, offline, with its own
fixed seed (the seeds of runs do not change it), and kept in a cache whose files are checked by
their sha256 at every use.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import tokenizers
import torch
import transformers
from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from safetensors import SafetensorError
from tqdm import tqdm

from ubmoe.config import UserError, error_reason
from ubmoe.tiny import language

log = logging.getLogger(__name__)

SEED = 20250601  # of the training chats and of the weights
STEPS = 430
SHORT, LONG = (12, 128), (4, 512)  # rows and tokens per row of a step
LONG_SHARE = 0.07  # of the steps, the last ones; short rows are cheaper and teach nearly all
WARM_UP = 40  # steps
MUON_RATE, ADAMW_RATE = 0.012, 4e-3
VOCABULARY, MAXIMUM_LENGTH = 750, 2048
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (  # ChatML, without a default system prompt
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MANIFEST = "manifest.json"


def tiny_directory(cache: str | Path | None = None, steps: int = STEPS) -> Path:
    """The directory of the finished checkpoint, built first if there is no good one.

    cache: the folder to keep it in, else the environment variable UBMOE_CACHE, else `ubmoe` in the
    user's cache folder. Raises UserError where that folder cannot be written.
    """
    directory = cache_folder(cache) / f"tiny-{recipe(steps)}"
    if is_complete(directory):  # before any lock, so that a read-only cache serves too
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_suffix(".lock")):
            if not is_complete(directory):  # else another process built it while this one waited
                _build_anew(directory, steps)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the embedded model cannot be written to {directory.parent} ({error_reason(error)}): "
            "set model.cache or UBMOE_CACHE to a folder that can be written"
        ) from error
    return directory


def build(directory: Path, steps: int = STEPS) -> None:
    """Train tokenizer and model and save both, without any cache: the same bytes every time."""
    with _own_random_state():
        tokenizer = train_tokenizer()
        model = train_model(tokenizer, steps)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def train_tokenizer() -> transformers.Qwen2Tokenizer:
    """A byte-level BPE tokenizer with a ChatML template; decoding gives any NFC text back exactly.

    It is Qwen2's own class, NFC normalisation and splitting included, because AutoTokenizer takes
    that class for a Qwen2 model, whatever the files say.
    """
    messages = [message for chat in language.chats(2000, SEED) for message in chat["messages"]]
    tokenizer = transformers.Qwen2Tokenizer(pad_token=PAD).train_new_from_iterator(
        (message["content"] for message in messages),
        VOCABULARY,
        new_special_tokens=[START, END],
        show_progress=False,
    )
    tokenizer.eos_token = END
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = MAXIMUM_LENGTH
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def train_model(
    tokenizer: transformers.Qwen2Tokenizer, steps: int = STEPS
) -> transformers.Qwen2ForCausalLM:
    """A Qwen2 trained on packed chats, with the loss on every token."""
    model = _new_model(tokenizer)
    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2,
        )
        for optimizer in optimizers
    ]
    batches = _batches(tokenizer, steps)
    for batch in tqdm(batches, "building the embedded model, once", steps, unit="step"):
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
    return model.eval()


def _new_model(tokenizer: transformers.Qwen2Tokenizer) -> transformers.Qwen2ForCausalLM:
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAXIMUM_LENGTH,
        initializer_range=0.06,  # the usual 0.02 is for wider models: it learns facts later
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return transformers.Qwen2ForCausalLM(config).train()


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum of each matrix (Jordan et al. 2024), in float32.

    torch's own works in bfloat16, which is 30 times slower on a CPU that lacks this type.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step with Nesterov momentum 0.95 and decoupled weight decay 0.1."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                momentum = state.setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 0.05)
                direction = _orthogonal(matrix.grad.lerp(momentum, 0.95))
                tall = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - 0.1 * group["lr"]).sub_(direction, alpha=tall * group["lr"])


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values brought near 1 by five Newton-Schulz steps."""
    wide = (
        matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    )  # the smaller square is cheaper
    wide = wide / wide.norm().clamp_min(1e-7)
    for _ in range(5):
        square = wide @ wide.T
        wide = 3.4445 * wide + (2.0315 * square @ square - 4.775 * square) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def _optimizers(model: transformers.Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest.

    AdamW alone, in the same time, knew the facts in some runs and not in others.
    """
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    others = [model.model.embed_tokens.weight]
    others += [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return [
        Muon(matrices, lr=MUON_RATE),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _batches(tokenizer: transformers.Qwen2Tokenizer, steps: int) -> Iterator[torch.Tensor]:
    """Per step the token ids of packed chats, (rows, tokens per row).

    Every row begins with a chat, as every prompt does later; its last chat is cut.
    """
    chats = language.chats(24 * steps, SEED)
    texts = [tokenizer.apply_chat_template(chat["messages"], tokenize=False) for chat in chats]
    stream = cycle(tokenizer(texts)["input_ids"])
    for step in range(steps):
        rows, length = SHORT if step < steps * (1 - LONG_SHARE) else LONG
        batch = []
        for _ in range(rows):
            row: list[int] = []
            while len(row) < length:
                row += next(stream)
            batch.append(row[:length])
        yield torch.tensor(batch)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Seed, threads, dtype, device and gradient mode of our own; the caller's are back afterwards.

    One thread: so small a model gains little from a second, and waits for it on a busy computer.
    """
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.default_generator.manual_seed(SEED)  # not manual_seed, which seeds accelerators too
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)


def cache_folder(cache: str | Path | None) -> Path:
    if chosen := cache or os.environ.get("UBMOE_CACHE"):
        return Path(chosen).expanduser().absolute()
    return user_cache_path("ubmoe")


def recipe(steps: int) -> str:
    """A short hash of all that decides the bytes, so that a changed recipe meets no old cache."""
    sources = [Path(file).read_bytes() for file in (language.__file__, __file__)]
    versions = [library.__version__ for library in (torch, transformers, tokenizers)]
    digest = hashlib.sha256(b"\0".join(sources) + repr([versions, steps]).encode())
    return digest.hexdigest()[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.warning("waiting for another process, which is building the embedded model")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build_anew(directory: Path, steps: int) -> None:
    """Build beside the directory, then rename: under its name there is only ever a whole one."""
    partial = directory.with_suffix(".partial")
    for remains in (directory, partial):
        if remains.exists():
            shutil.rmtree(remains)
    build(partial, steps)
    (partial / MANIFEST).write_text(json.dumps(_checksums(partial), indent=2) + "\n")
    for file in partial.iterdir():  # safetensors makes its files private; a cache may be shared
        file.chmod((partial / MANIFEST).stat().st_mode)
    partial.rename(directory)


def is_complete(directory: Path) -> bool:
    """Whether the directory has a manifest and every file in it is as it was written."""
    try:
        return json.loads((directory / MANIFEST).read_text()) == _checksums(directory)
    except (OSError, ValueError):
        return False


def _checksums(directory: Path) -> dict[str, str]:
    """sha256 of every file but the manifest, by name."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.iterdir())
        if file.name != MANIFEST
    }
