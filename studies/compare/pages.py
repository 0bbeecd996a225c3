"""The generated tables of README.md and of the pages in docs/ and studies/, from the records."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from studies.compare.blocks import differences, probes, scores
from ubmoe.config import Config, UserError
from ubmoe.files import replace_all, write_text
from ubmoe.results.records import Records, read_benchmarks, recorded

PLACES = ("docs/*.md", "studies/*/*.md")  # of pages, beside the README
BLOCK = re.compile(r"(<!-- (\w+): ([\w.-]+)(?: seeds ([\d ]+))? -->)\n.*?<!-- end -->", re.DOTALL)


def renew(config: Config) -> str:
    """Renew the generated tables of every page from the recorded results of `results.seeds`."""
    records, benchmarks = recorded(config), read_benchmarks(config)
    pages = [Path("README.md"), *(each for place in PLACES for each in sorted(Path().glob(place)))]
    texts = {
        page: renewed(page.read_text(encoding="utf-8"), records, config.results.seeds, benchmarks)
        for page in pages
    }
    replace_all({page: partial(write_text, text=text) for page, text in texts.items()})
    return "\n".join(map(str, pages))


def renewed(
    text: str,
    records: Records,
    seeds: Sequence[int],
    benchmarks: Mapping[str, list[dict[str, Any]]] = MappingProxyType({}),
) -> str:
    """The text with every block between `<!-- kind: name -->` and `<!-- end -->` made anew.

    seeds: those whose runs are averaged, where a block does not say its own. Raises UserError for a
    block without any record.
    """

    def block(match: re.Match[str]) -> str:
        heading, kind, name, said = match.groups()
        own = [int(each) for each in said.split()] if said else seeds
        made = (
            scores.benchmark_block(benchmarks.get(name, []))
            if kind == "benchmark"
            else BLOCKS[kind](name, records, own)
        )
        if not made:
            raise UserError(
                f"results.directory: no records of seeds {', '.join(map(str, own))} for the "
                f"block {kind}: {name}"
            )
        return f"{heading}\n{made}\n<!-- end -->"

    return BLOCK.sub(block, text)


BLOCKS = {
    "dependence": scores.dependence_block,
    "sts": scores.sts_block,
    "change": differences.change_block,
    "twins": differences.twins_block,
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
