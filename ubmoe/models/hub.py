"""Saved models to a model hub: a repository for each folder, in one commit."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ubmoe.config import HubSection, UserError, error_reason
from ubmoe.models import cards

log = logging.getLogger(__name__)
NAMES = {"bi": "{}", "modes": "{}-modes", "adapter": "{}-adapter", "ubmoe": "{}-ubmoe"}
CLEAN = {cards.CARD: cards.for_hub, "bi/adapter_config.json": cards.with_base}


def push(settings: HubSection, folders: Sequence[Path], endpoint: str | None = None) -> None:
    """Put folders into repositories, made where they are missing; nothing without `hub.push`.

    endpoint: of the hub; null: HF_ENDPOINT or the library's own. Raises UserError: the folders stay
    as they are.
    """
    if settings.push is None:
        return
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi(endpoint=endpoint)
    for folder in folders:
        name = NAMES[folder.name].format(settings.push)
        try:
            hub.create_repo(name, private=settings.private, exist_ok=True)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            added = [
                CommitOperationAdd(
                    path.relative_to(folder).as_posix(), _content(folder, path, name)
                )
                for path in files
                if not path.name.startswith(".ubmoe")
            ]
            hub.create_commit(name, added, commit_message="Put by ubmoe")
        except Exception as error:  # the hub's library raises nearly every type here
            raise UserError(
                f"hub.push: {folder} cannot be put into {name} ({error_reason(error)}); the folder "
                "is whole: check the name, the network and your login (hf auth login)"
            ) from error
        log.info("pushed %s to %s", folder, name)


def _content(folder: Path, path: Path, name: str) -> bytes | str:
    """A file as the hub gets it: its path, or what it says there."""
    change = CLEAN.get(path.relative_to(folder).as_posix())
    if change is None:
        return str(path)
    return change(path.read_text(encoding="utf-8"), name).encode()
