"""Noise is as long as asked for, in the matrices that would train, and nothing is left of it."""

import json
from pathlib import Path

import pytest
import torch
from builders import random_model

from studies.compare import noise
from ubmoe.config import StageSection, UserError, load_config

KEYS = [
    *("trajectory.steps=[2]", "trajectory.perplexity=[tiny]", "trajectory.max_texts=5"),
    *("bi.prompt=null", "bi.stages.0.max_rows=40", "results.row=noise", "model.device=cpu"),
]


def test_each_matrix_moves_by_its_part_along_a_line_and_comes_back():
    model = random_model("qwen2")
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    moved = []
    for distance in noise.disturbed(model, StageSection(train=["ffn"]), [0.0, 0.01, 0.02], seed=3):
        moved.append({name: v.detach() - start[name] for name, v in model.named_parameters()})
        for name, change in moved[-1].items():
            expected = distance * start[name].norm() if ".mlp." in name else 0.0
            assert float(change.norm()) == pytest.approx(float(expected), rel=1e-3), name
    for name, change in moved[2].items():
        torch.testing.assert_close(change, 2 * moved[1][name], rtol=1e-3, atol=1e-6)
    assert all(torch.equal(value, start[name]) for name, value in model.named_parameters())
    [other] = [
        dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"].detach().clone()
        for _ in noise.disturbed(model, StageSection(train=["ffn"]), [0.01], seed=4)
    ]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(other - start[name], moved[1][name])


def test_the_result_is_a_trajectory_whose_first_point_is_untouched(tiny_path, tmp_path):
    pairs = ["4\tThe dog sleeps.\tA dog sleeps.", "1\tAnna sings.\tThe cat sees Paul.", "0\ta\tb"]
    (tmp_path / "pairs.tsv").write_text("\n".join(["score\tsentence1\tsentence2", *pairs, ""]))
    few = [f"trajectory.sts=[{tmp_path}/pairs.tsv]", f"output_dir={tmp_path}/run"]
    config = load_config(Path("configs/tiny.yaml"), [*KEYS, *few])
    path = noise.main(config, noise.parts("0.05,0.5"))
    section = json.loads(path.read_text())["sts"]
    points = section["trajectory"]
    assert [point["distance"] for point in points] == [0.0, 0.05, 0.5]
    lost = [point["perplexity"]["tiny"]["perplexity"] for point in points]
    assert lost[0] < lost[1] < lost[2]
    assert section["average"] == points[-1]["sts"]["average"]


@pytest.mark.parametrize("given", ["", "x", "0", "nan", "0.1,", "1"])
def test_a_wrong_distance_is_one_line(given):
    with pytest.raises(UserError, match="distances"):
        noise.parts(given)
