"""Two processes end as one does with the whole batch: negatives gathered, what trains in parts.

All that two processes do is done in one launch, since that takes long.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate import PartialState
from builders import ROOT, WORDS, KilledError, drawn, join, pair, random_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

from ubmoe.config import BiSection, MoeSection, StageSection, UserError
from ubmoe.data.chats import Chat
from ubmoe.encoder import contrastive, mntp
from ubmoe.encoder.contrastive_loss import CachedContrastiveLoss, ContrastiveLoss
from ubmoe.encoder.sentence_encoder import as_encoder
from ubmoe.models.loading import best_device
from ubmoe.models.precision import cast
from ubmoe.moe import router_training
from ubmoe.training import sharding
from ubmoe.training.checkpoints import StageRun
from ubmoe.training.modules import tuning
from ubmoe.training.trainer import GuardedTrainer

ROWS = 24
BATCH = 8  # of all processes
STEPS = {"max_steps": 3, "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-2}
STEPS |= {"adam_epsilon": 1e-2}  # the usual one would make a sign of a rounding error
STEPS |= {"bf16": False}  # which auto is not on every processor


def pairs(path):
    """(anchor, positive) rows of many lengths: two halves of a batch make unlike mini-batches."""
    texts = [
        [" ".join(WORDS[: 2 + (5 * n + c) ** 2 % 11]) + f" {n}" for n in range(ROWS)]
        for c in (0, 1)
    ]
    lines = ["sent0,sent1", *map(",".join, zip(*texts, strict=True))]
    path.write_text("\n".join(lines))


def contrast(tiny_path, folder, work, dtype="float32", **keys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    model = random_model("qwen2", vocab_size=len(tokenizer), tie_word_embeddings=False)
    cast(model, getattr(torch, dtype))
    encoder = as_encoder(model, tokenizer, BiSection(prompt=None))
    common = {"objective": "supervised", "dataset": str(folder / "pairs.csv"), "temperature": 0.5}
    stage = StageSection(**common | {"mini_batch_tokens": 40} | keys)
    rows, _ = contrastive.read_dataset(stage, tokenizer)
    return model, contrastive.train_stage(encoder, model, stage, rows, work)["log"]


GATHERED = {"simcse": False, "nt_xent": True}  # the forms of the loss; whether cached
COLUMNS = [
    [" ".join(WORDS[: 3 + (5 * i + 3 * c) % 11]) + f" {i}" for i in range(8)] for c in range(3)
]


def gradient(tiny_path, form, cached, rank, world):
    """The gradient of this rank's share of the batch, as DistributedDataParallel averages it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    model = random_model("qwen2", vocab_size=len(tokenizer))
    encoder = as_encoder(model, tokenizer, BiSection(prompt=None))
    columns = COLUMNS if form == "simcse" else COLUMNS[:2]
    mine = [column[rank * 8 // world : (rank + 1) * 8 // world] for column in columns]
    kind = CachedContrastiveLoss if cached else ContrastiveLoss
    loss = kind(encoder, form, 0.1, 30)
    if world > 1:
        loss.model = DistributedDataParallel(encoder)
    loss([dict(encoder.preprocess(texts)) for texts in mine]).backward()
    return {name: value.grad for name, value in model.model.named_parameters()}


def masked(tiny_path, folder, work, **keys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    model = random_model("qwen2", vocab_size=len(tokenizer), tie_word_embeddings=False)
    common = {"objective": "mntp", "dataset": "tiny", "lora": None, "max_tokens": 16}
    stage = StageSection(**common | {"masking": "all", "mlm_probability": 1.0} | keys)
    chunks = torch.randint(
        5, len(tokenizer), (ROWS, 16), generator=torch.Generator().manual_seed(2)
    )
    return model, mntp.train_stage(model, tokenizer, stage, chunks, work)["log"]


def routers(tiny_path, folder, work, **keys):
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 97, (ROWS, 12), generator=draw).tolist()
    chats = [
        Chat(f"{n}", row, [False] * 4 + [True] * 8, ["answer"] * 12) for n, row in enumerate(ids)
    ]
    model = drawn(join(*pair()))
    return model, router_training.train(model, MoeSection(**keys), chats, work)


CASES = {
    "ffn": (contrast, {"train": ["ffn"]}),
    "attention, cached, recomputed": (
        contrast,
        {"train": ["attention"], "cached": True, "activation_checkpointing": True},
    ),
    "all": (contrast, {"train": ["all"]}),
    "mntp": (masked, {"train": ["ffn", "attention"]}),
    "routers": (routers, {}),
    "bfloat16": (contrast, {"train": ["ffn"], "bf16": True, "dtype": "bfloat16"}),
}


def trained(case, tiny_path, directory, distributed, size=BATCH // 2, resume=False, killed=0):
    """The weights that training ends with, its log, and the numbers that this process trained.

    killed: the step in which it dies.
    """
    held, real = [], GuardedTrainer.training_step

    def step(trainer, model, *rest, **more):
        weights = [value for value in trainer.model.parameters() if value.requires_grad]
        held.append(sum(getattr(value, "_local_tensor", value).numel() for value in weights))
        if len(held) == killed:
            raise KilledError
        loss = real(trainer, model, *rest, **more)
        if isinstance(model, DistributedDataParallel):  # no gradient is there twice
            sizes = (
                (weight.grad.untyped_storage().nbytes(), weight.grad.nbytes) for weight in weights
            )
            assert all(bucket > own for bucket, own in sizes)
        return loss

    run, keys = CASES[case]
    work = StageRun(directory, 0, resume, distributed=distributed)
    keys = STEPS | {"per_device_train_batch_size": size} | keys
    with patch.object(GuardedTrainer, "training_step", step):
        model, log = run(tiny_path, directory.parent, work, **keys)
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        log,
        max(held, default=0),
    )


def every_case(tiny_path, folder):
    found = {case: trained(case, tiny_path, folder / case, "fsdp2") for case in CASES}
    found["bfloat16, ddp"] = trained("bfloat16", tiny_path, folder / "ddp", "ddp")
    return found


def gone_on(tiny_path, folder):
    """A run that is killed after a checkpoint, and goes on in parts, or with all on each."""
    found = {"": trained("ffn", tiny_path, folder / "whole", "fsdp2")}
    for distributed in ("fsdp2", "ddp"):
        place = folder / distributed
        with pytest.raises(KilledError):
            trained("ffn", tiny_path, place, "fsdp2", killed=3)
        found[distributed] = trained("ffn", tiny_path, place, distributed, resume=True)
        found[f"{distributed}, again"] = trained("ffn", tiny_path, place, distributed, resume=True)
    return found


def main(tiny_path, folder):
    best_device("cpu" if torch.accelerator.is_available() else None)  # as the scripts begin
    folder, state = Path(folder), PartialState()
    place = state.process_index, state.num_processes
    gathered = {
        form: gradient(tiny_path, form, cached, *place) for form, cached in GATHERED.items()
    }
    found = every_case(tiny_path, folder), gone_on(tiny_path, folder), gathered
    if state.is_main_process:
        torch.save(found, folder / "found.pt")
    state.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tiny_path, tmp_path_factory):
    """What `every_case`, `gone_on` and `gradient` have found."""
    folder = tmp_path_factory.mktemp("two")
    pairs(folder / "pairs.csv")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    done = subprocess.run(
        [*launch, __file__, str(tiny_path), str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt")


def assert_same(found, expected, **tolerance):
    """Losses, norms of the gradient and final weights."""
    rows, others = ([row for row in item[1] if "loss" in row] for item in (found, expected))
    for item, other in zip(rows, others, strict=True):
        for key in ("loss", "grad_norm"):
            assert item[key] == pytest.approx(other[key], rel=tolerance["rtol"]), key
    for name, value in expected[0].items():
        assert found[0][name].dtype == value.dtype
        torch.testing.assert_close(
            found[0][name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
def test_gathered_negatives_give_the_gradient_of_the_whole_batch(tiny_path, of_two_processes):
    _, _, gathered = of_two_processes
    for form, found in gathered.items():
        expected = gradient(tiny_path, form, False, 0, 1)
        largest = max(value.abs().max() for value in expected.values())
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name] / largest,
                value / largest,
                atol=1e-5,
                rtol=0,
                msg=lambda m, where=f"{form}, {name}": f"{where}: {m}",
            )


@pytest.mark.slow
def test_two_processes_in_parts_end_as_one_with_the_whole_batch(
    tiny_path, tmp_path, of_two_processes
):
    """Each sees half of every batch, against the negatives of both, and holds half of what trains.

    In bfloat16 sums are rounded elsewhere: there it is compared with two whole processes.
    """
    found, _, _ = of_two_processes
    pairs(tmp_path / "pairs.csv")
    for case in CASES:
        expected = trained(case, tiny_path, tmp_path / f"{case}, one", "fsdp2", BATCH)
        assert found[case][2] == expected[2] / 2
        if case != "bfloat16":
            assert_same(found[case], expected, rtol=1e-5, atol=1e-6)
    assert_same(found["bfloat16"], found["bfloat16, ddp"], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_a_killed_run_in_parts_goes_on_in_parts_or_whole(of_two_processes):
    _, found, _ = of_two_processes
    assert found["ddp"][2] == 2 * found["fsdp2"][2]
    for case in ("fsdp2", "ddp", "fsdp2, again", "ddp, again"):
        assert_same(found[case], found[""], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train": ["ffn", "embedding"]}, "train: the embedding is also the head of this model"),
        ({"optim": "adafactor"}, "optim: adafactor is not for distributed: fsdp2; expected adamw"),
    ],
)
def test_what_cannot_be_in_parts_is_refused(tmp_path, monkeypatch, keys, said):
    monkeypatch.setattr(sharding, "PartialState", lambda: SimpleNamespace(num_processes=2))
    model, stage = random_model("qwen2", tie_word_embeddings=True), StageSection(**keys)
    work = StageRun(tmp_path, 0, distributed="fsdp2")
    with pytest.raises(UserError, match=said), tuning(model, stage, work):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
