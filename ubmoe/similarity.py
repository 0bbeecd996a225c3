"""The similarity section of a result, one shape wherever it stands.

`attention` (the mask), `metric`, `unit`, `tasks` ({name: score}), `intervals`, `average`, `sources`
and what else `evaluate.sts` says. sts.json has one under `sts`; generation.json has a list there,
one for each route and mask, with the key `route` more; evaluation.json one under `evaluation`,
without `attention`, as it takes encoders of any kind.
"""

from collections.abc import Mapping
from typing import Any

UNITS = {"metric": "cosine_spearman", "unit": "Spearman x 100"}


def sections(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every section of a result, in its order; [] where it has none.

    That of an older sts.json does not say its mask: the config does.
    """
    scored = result.get("sts", result.get("evaluation")) or []
    if isinstance(scored, list):
        return scored
    mask = result.get("config", {}).get("bi", {}).get("attention")
    return [({"attention": mask} if "sts" in result and mask else {}) | scored]
