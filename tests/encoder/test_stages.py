"""Stages are checked before the first of them writes anything."""

import pytest

from ubmoe.config import UserError, load_config
from ubmoe.encoder.stages import Data, train_stages


def test_a_batch_that_a_later_stage_cannot_fill_is_refused_before_the_first_one_trains(tmp_path):
    stages = "bi.stages=[{max_steps: 1}, {per_device_train_batch_size: 9}]"
    config = load_config(None, [f"output_dir={tmp_path}", stages])
    data = [Data(range(100), []), Data(range(8), [])]
    nothing = {"encoder": None, "model": None, "tokenizer": None}
    with pytest.raises(UserError, match=r"bi\.stages\.1\.dataset: 8 rows .* a step takes 9"):
        train_stages(config, data, **nothing)
    assert not list(tmp_path.iterdir())
