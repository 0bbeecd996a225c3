"""Noise in place of tuning: what a change of the weights costs that has no direction.

python -m studies.compare.noise studies/fronts/smollm2-135m.yaml 0.001,0.002,0.004 seed=0

To each matrix that the first stage would tune Gaussian noise is added, of a given part of that
matrix's norm. The model is then scored as `trajectory` says, and the result is a trajectory like
that of a tuned run: <output_dir>/sts.json, whose `distance` is the norm of the noise over that of
the weights. The points of a seed lie on one line from the untouched model.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ubmoe import cli
from ubmoe.config import Config, StageSection, UserError
from ubmoe.encoder.sentence_encoder import as_encoder
from ubmoe.evaluate.trajectory import Trajectory
from ubmoe.models.loading import load_model
from ubmoe.models.source import ModelSource
from ubmoe.recording import recording
from ubmoe.training.modules import named_by

Weights = dict[str, torch.Tensor]


def main(config: Config, distances: Sequence[float]) -> Path:
    """Score the model at each distance, the untouched one first. Returns the result's path."""
    if not config.bi.stages:
        raise UserError("bi.stages: the first says what is disturbed; expected one")
    with recording("noise", "sts", config) as run:
        source, stage = ModelSource.of(config.model), config.bi.stages[0]
        config = source.within_context(config, "bi", "trajectory")
        trajectory = Trajectory(config, source.tokenizer)
        run.model = model = load_model(source, *config.bi.mask)
        encoder = as_encoder(model, source.tokenizer, config.bi)
        points = []
        for distance in disturbed(model, stage, [0.0, *distances], config.seed):
            point = trajectory.point(encoder, model, stage)
            points.append({"stage": 0, "step": 0, **point, "distance": distance})
            run.log("distance %g: STS %.2f", distance, point["sts"]["average"])
        run.section = points[-1]["sts"] | {"trajectory": points}
    return run.path


@torch.no_grad()
def disturbed(
    model: PreTrainedModel, stage: StageSection, distances: Sequence[float], seed: int
) -> Iterator[float]:
    """Yield each distance while the stage's matrices are so far from where they were."""
    names = {name for module in stage.train for name in named_by(model, module)}
    generator = torch.Generator().manual_seed(seed)
    before: Weights = {}
    noise: Weights = {}
    for name, value in model.named_parameters():
        if name in names:
            drawn = torch.randn(value.shape, generator=generator).to(value)
            before[name], noise[name] = value.clone(), drawn * (value.norm() / drawn.norm())
    for distance in distances:
        for name, start in before.items():
            model.get_parameter(name).copy_(start + distance * noise[name])
        yield distance
    for name, start in before.items():
        model.get_parameter(name).copy_(start)


def parts(text: str) -> list[float]:
    """The distances of a text as 0.001,0.002, in parts of the weights' norm. Raises UserError."""
    try:
        distances = [float(part) for part in text.split(",")]
    except ValueError:
        distances = []
    if not distances or not all(0 < distance < 1 for distance in distances):
        raise UserError(
            f"distances: expected parts of the weights' norm after the config, as 0.001,0.002;"
            f" got {text!r}"
        )
    return distances


if __name__ == "__main__":
    given = "".join(sys.argv[2:3])
    del sys.argv[2:3]  # the distances follow the config; the rest is as every program has it

    cli.run(
        "python -m studies.compare.noise",
        __doc__ or "",
        lambda config: main(config, parts(given)),
        lower="evaluation.batch_size",
    )
