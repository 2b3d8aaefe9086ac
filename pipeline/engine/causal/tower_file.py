"""Finds the file of a causal tower that a configuration names."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from pipeline.config import EngineConfig
from pipeline.engine.checkpoint import EMBEDDED_FOLDER, CheckpointError, content_hash, download, folder_revision

KEY = "engine.tower"
OFFLINE = "offline"
"""Names the model's own tower, which was never trained to hear block by block."""
_EMBEDDED = "embedded/"
_HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")


def find_tower(reference: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The safetensors file that `reference` names (a file, a folder with one, `embedded/tower`, a Hub id), and its
    commit when it comes from the Hub. Raises CheckpointError."""
    path, commit = Path(reference).expanduser(), None
    if reference.startswith(_EMBEDDED):
        path = EMBEDDED_FOLDER / reference.removeprefix(_EMBEDDED)
    if not path.exists():
        if reference.startswith(_EMBEDDED) or not _HUB_ID.fullmatch(reference):
            raise CheckpointError(
                f"{KEY}: {reference!r} is no file or folder on this machine and no Hub id (ORG/NAME); "
                f"there are embedded/tower, and {OFFLINE}, the model's own"
            )
        path = download(reference, revision, KEY)
        commit = path.name
    elif revision is not None:
        raise CheckpointError(f"{KEY}_revision: {revision!r} is for Hub ids; {reference!r} is here, remove the key")
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise CheckpointError(f"{path} must hold one safetensors file, the tower; it has {found}")
        path = files[0]
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is no safetensors file; pickles are never loaded, as reading one runs code")
    return path, commit


def local_revision(reference: str | None) -> str | None:
    """The revision of a tower on this machine; None for one of the Hub, which is not fetched, and for none."""
    is_here = reference is not None and (reference.startswith(_EMBEDDED) or Path(reference).expanduser().exists())
    return content_hash(find_tower(reference)[0].parent) if is_here and reference is not None else None


def local_weights(engine: EngineConfig) -> str | None:
    """Which weights folders on this machine hold: the model's, and those of a causal tower."""
    revisions = (folder_revision(engine.model, engine.quantization), local_revision(engine.tower))
    return "+".join(revision for revision in revisions if revision) or None


def untrained(language: str, trained: Collection[str]) -> str:
    """Why what is said in `language` is refused."""
    return (
        f"{language} is none of the languages that the causal tower was trained on ({', '.join(sorted(trained))}); "
        "engine.untrained_languages: true (--force) runs it all the same"
    )
