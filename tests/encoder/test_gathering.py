"""Negatives gathered over processes: the gradient is that of one process with the whole batch."""

import os
import subprocess
import sys

import pytest
import torch
from builders import ROOT, WORDS, random_model
from transformers import AutoTokenizer

from ubmoe.config import BiSection
from ubmoe.encoder.contrastive_loss import CachedContrastiveLoss, ContrastiveLoss
from ubmoe.encoder.sentence_encoder import as_encoder

TEXTS = [
    [" ".join(WORDS[: 3 + (5 * i + 3 * c) % 11]) + f" {i}" for i in range(8)] for c in range(3)
]


def gradient(tiny_path, form, cached, rank, world):
    """The gradient of this rank's share of the batch, as DistributedDataParallel averages it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    model = random_model("qwen2", vocab_size=len(tokenizer))
    encoder = as_encoder(model, tokenizer, BiSection(prompt=None))
    columns = TEXTS if form == "simcse" else TEXTS[:2]
    mine = [column[rank * 8 // world : (rank + 1) * 8 // world] for column in columns]
    kind = CachedContrastiveLoss if cached else ContrastiveLoss
    loss = kind(encoder, form, 0.1, 30)
    if world > 1:
        loss.model = torch.nn.parallel.DistributedDataParallel(encoder)
    loss([dict(encoder.preprocess(texts)) for texts in mine]).backward()
    return {name: value.grad for name, value in model.model.named_parameters()}


CACHED = {"simcse": False, "nt_xent": True}


def main(tiny_path, target):
    from accelerate import PartialState

    state = PartialState(cpu=True)
    place = state.process_index, state.num_processes
    found = {form: gradient(tiny_path, form, cached, *place) for form, cached in CACHED.items()}
    if state.is_main_process:
        torch.save(found, target)
    state.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one_with_the_whole_batch(tiny_path, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += ["--standalone", __file__, str(tiny_path), f"{tmp_path}/g.pt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for form, found in torch.load(tmp_path / "g.pt").items():
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


if __name__ == "__main__":
    main(*sys.argv[1:])
