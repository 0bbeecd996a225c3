"""The numbers that the papers print, with their tables, as data: one YAML a paper."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent


@cache
def published(paper: str) -> dict[str, dict[str, Any]]:
    """Tables of a paper: {name: {columns, rows: [{model, method, scores}]}}."""
    return yaml.safe_load((FOLDER / f"{paper}.yaml").read_text(encoding="utf-8"))
