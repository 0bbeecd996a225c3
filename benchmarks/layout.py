"""The effect of frozen bfloat16 weights on a tuned encoder: STS of two runs of train_bi.py.

python -m benchmarks.layout configs/smollm2-135m.yaml model.name=folder [key=value ...]

Both train under bfloat16 autocast from the same weights, rounded to bfloat16 once: one keeps all of
them in float32 (`model.dtype=float32`), the other what does not train in bfloat16
(`model.dtype=bfloat16`). Claim: STS within 0.3.

Where the processor has no bfloat16, its products are computed in float32 from the rounded numbers
and rounded again, which is what such a processor does but for the order of its sums.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import train_bi
from benchmarks.common import write
from ubmoe.config import Config, load_config, with_keys
from ubmoe.models.loading import best_device, load_model
from ubmoe.models.precision import cast, has_bfloat16
from ubmoe.models.source import ModelSource

LIMIT = 0.3
PRODUCTS = {
    *(torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm),
    *(torch.ops.aten.linear, torch.ops.aten.matmul),  # whole, where inference mode is on
}


class Rounded(TorchDispatchMode):
    """Products of bfloat16 numbers, computed in float32 and rounded once."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in PRODUCTS and args[0].dtype == torch.bfloat16:
            args = tree_map(
                lambda tensor: tensor.float() if torch.is_tensor(tensor) else tensor, args
            )
            return func(*args, **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


def products() -> AbstractContextManager[Any]:
    return nullcontext() if has_bfloat16(best_device()) else Rounded()


def main(*given: str) -> None:
    config = load_config(given[0], list(given[1:]))
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        start = Path(folder) / "model"
        cast(load_model(config.model), torch.bfloat16).save_pretrained(start)
        ModelSource.of(config.model).tokenizer.save_pretrained(start)
        stages = range(len(config.bi.stages))
        keys = [f"model.name={start}", *(f"bi.stages.{stage}.bf16=true" for stage in stages)]
        for dtype in ("float32", "bfloat16"):
            arguments = [*keys, f"model.dtype={dtype}", f"output_dir={folder}/{dtype}"]
            with products():
                result = tuned(train_bi.main, with_keys(config, arguments))
            logs = [row for stage in result["stages"] for row in stage["log"] if "loss" in row]
            row = {"weights": dtype, "steps": sum(stage.max_steps for stage in config.bi.stages)}
            rows.append(row | {"last loss": logs[-1]["loss"], "STS": result["average"]})
    apart = abs(rows[0]["STS"] - rows[1]["STS"])
    rows[1] |= {"apart": apart, "limit": LIMIT, "holds": "yes" if apart <= LIMIT else "no"}
    rows[0] |= {"apart": "", "limit": "", "holds": ""}
    model = Path(config.model.name).stem
    write("layout", [{"model": model, **row} for row in rows], products=type(products()).__name__)


def tuned(main: Callable[[Config], Path | None], config: Config) -> dict[str, Any]:
    """The `sts` section of a run."""
    path = main(config)
    assert path is not None
    return json.loads(path.read_text())["sts"]


if __name__ == "__main__":
    main(*sys.argv[1:])
