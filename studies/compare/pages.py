"""The generated tables of README.md and of the pages in docs/ and studies/, from the records."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from studies.compare.blocks import differences, encoders, fronts, probes, scores
from studies.compare.records import Records, read_benchmarks, recorded
from ubmoe.config import Config, UserError, with_keys
from ubmoe.files import replace_all, write_text

PLACES = ("docs/*.md", "studies/*/*.md")  # of pages, beside the README
BLOCK = re.compile(r"(<!-- (\w+): ([\w.-]+)(?: seeds ([\d ]+))? -->)\n.*?<!-- end -->", re.DOTALL)


def renew(config: Config) -> str:
    """Renew the generated tables of every page from the recorded results of `results.seeds`."""
    texts = pages(config)
    replace_all({page: partial(write_text, text=text) for page, text in texts.items()})
    return "\n".join(map(str, texts))


def pages(config: Config, root: Path = Path()) -> dict[Path, str]:
    """Every page of a checkout, its tables made anew.

    A study's page, and a block that is named after a study, have that study's records alone.
    """
    everything, benchmarks = recorded(config), read_benchmarks(config)

    def of_study(name: str) -> Records:
        return recorded(with_keys(config, [f"results.directory={root / 'studies' / name}"]))

    def renewed_page(page: Path) -> str:
        is_of_study = page.parent.parent == root / "studies"
        records = of_study(page.parent.name) if is_of_study else everything
        text = page.read_text(encoding="utf-8")
        return renewed(text, records, config.results.seeds, benchmarks, of_study)

    paths = [root / "README.md", *(page for place in PLACES for page in sorted(root.glob(place)))]
    return {page: renewed_page(page) for page in paths}


def renewed(
    text: str,
    records: Records,
    seeds: Sequence[int],
    benchmarks: Mapping[str, list[dict[str, Any]]] = MappingProxyType({}),
    of_study: Callable[[str], Records] | None = None,
) -> str:
    """The text with every block between `<!-- kind: name -->` and `<!-- end -->` made anew.

    seeds: those whose runs are averaged, where a block does not say its own. of_study: reads the
    records of a study, after which the blocks of STUDY are named. Raises UserError for a block
    without any record.
    """

    def block(match: re.Match[str]) -> str:
        heading, kind, name, said = match.groups()
        chosen = [int(seed) for seed in said.split()] if said else seeds
        if kind == "benchmark":
            made = scores.benchmark_block(benchmarks.get(name, []))
        else:
            of = of_study(name) if kind in STUDY and of_study else records
            made = BLOCKS[kind](name, of, chosen)
        if not made:
            raise UserError(
                f"results.directory: no records of seeds {', '.join(map(str, chosen))} for the "
                f"block {kind}: {name}"
            )
        return f"{heading}\n{made}\n<!-- end -->"

    return BLOCK.sub(block, text)


STUDY = ("encoders", "front", "equal_fronts", "moved")  # blocks that are named after a study
BLOCKS = {
    "encoders": encoders.encoders_block,
    "front": fronts.front_block,
    "equal_fronts": fronts.equal_fronts_block,
    "moved": fronts.moved_block,
    "dependence": scores.dependence_block,
    "sts": scores.sts_block,
    "change": differences.change_block,
    "controls": differences.controls_block,
    "layers": differences.layers_block,
    "swap": differences.swap_block,
    "shift": differences.shift_block,
    "equal": differences.equal_block,
    "masks": differences.masks_block,
    "runs": differences.runs_block,
    "questions": differences.questions_block,
    "claim": differences.claim_block,
    "poolings": scores.poolings_block,
    "mixture": scores.mixture_block,
    "bitune": scores.bitune_block,
    "probing": probes.probing_block,
    "paper": scores.paper_block,
    "scan": scores.scan_block,
}
