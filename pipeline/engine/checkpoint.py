"""Finds the checkpoint that a configuration names, and refuses what these engines cannot run before loading it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipeline.config import Quantization

_HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
MODEL_TYPE = "qwen3_asr"
_ALIGNER = "engine.aligner"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "embedded"
_FILES = ["*.json", "*.txt", "*.jinja", "*.safetensors", "modelopt_state.pth"]
INT4_FILES = ("modelopt_state.pth", "hf_quant_config.json", "shardscribe_int4.json")
"""One of them is in every INT4 checkpoint; see `quantized`."""
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_SAMPLED_BLOCKS, _BLOCK_BYTES = 256, 4096


class CheckpointError(ValueError):
    """The model cannot be found or is none that Shardscribe runs; the message says what would be right."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A validated folder. `revision` is the commit of a Hub snapshot, else `content_hash` of the folder.
    `eos_token_ids` are within the vocabulary and not empty (an aligner has none)."""

    path: Path
    model_id: str
    revision: str
    eos_token_ids: tuple[int, ...]


def resolve(
    model: str,
    revision: str | None = None,
    key: str = "engine.model",
    quantization: Quantization = "none",
) -> Checkpoint:
    """Find `model` and check it: `embedded/NAME`, else a local folder, else a Hub id (at a branch, tag or commit).

    `key` is the key of the configuration that names it; under engine.aligner it has to be an aligner, which has no end
    tokens. A quantized checkpoint is refused where `quantization` is none; whether it is one is for `quantized.read`. A
    Hub snapshot in the local cache is enough when the Hub cannot be reached. Raises CheckpointError.
    """
    if model.startswith("embedded/"):
        path, commit = _embedded(model, key), None
    elif Path(model).expanduser().is_dir():
        path, commit = Path(model).expanduser().resolve(), None
    elif _HUB_ID.fullmatch(model):
        path = download(model, revision, key)
        commit = path.name
    else:
        raise CheckpointError(
            f"{key}: {model!r} is no folder on this machine and no Hub id (ORG/NAME); {_embedded_names()}"
        )
    if commit is None and revision is not None:
        name = "engine.aligner_revision" if key == _ALIGNER else f"{key.removesuffix('model')}revision"
        raise CheckpointError(f"{name}: {revision!r} is for Hub ids; {model!r} is a folder, remove the key")
    eos_token_ids = _validate(path, key, quantization)
    return Checkpoint(path, model, commit or content_hash(path), eos_token_ids)


def folder_revision(model: str, quantization: Quantization = "none") -> str | None:
    """The revision of a checkpoint in a folder (or embedded), validated; None for a Hub id, which is not fetched.

    Raises CheckpointError.
    """
    is_folder = model.startswith("embedded/") or Path(model).expanduser().is_dir() or not _HUB_ID.fullmatch(model)
    return resolve(model, quantization=quantization).revision if is_folder else None


def content_hash(path: Path) -> str:
    """40 hex digits of all that is loaded from a folder: BLAKE2b over the small files and, of each weights file, its
    name, size, header and 256 blocks of 4 KiB spread evenly. Training moves every weight, so the blocks tell two
    trainings of one shape apart without reading gigabytes."""
    digest = hashlib.blake2b(digest_size=20)
    for file in sorted(path.iterdir()):
        if file.suffix in {".json", ".txt", ".jinja"} or file.name in INT4_FILES:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
        elif file.suffix == ".safetensors":
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(8 + _header_bytes(file)))
                for block in range(_SAMPLED_BLOCKS):
                    stream.seek(block * max(0, size - _BLOCK_BYTES) // (_SAMPLED_BLOCKS - 1))
                    digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def weight_names(path: Path) -> set[str]:
    """Names of all tensors in a checkpoint's weights, from the headers alone."""
    return {name for file in weight_files(path) for name in _header(file) if name != "__metadata__"}


def _embedded(model: str, key: str) -> Path:
    path = EMBEDDED_FOLDER / model.removeprefix("embedded/")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{key}: there is no {model!r}; {_embedded_names()}")
    return path


def embedded_models() -> dict[str, Path]:
    """`embedded/NAME` -> folder, of the checkpoints that come with the package."""
    return {f"embedded/{file.parent.name}": file.parent for file in sorted(EMBEDDED_FOLDER.glob("*/config.json"))}


def _embedded_names() -> str:
    return f"embedded models: {', '.join(embedded_models()) or 'none in this installation'}"


def download(model: str, revision: str | None, key: str) -> Path:
    """A snapshot of a Hub id, or the one in the local cache when the Hub cannot be reached. Raises CheckpointError."""
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES))
    except GatedRepoError as error:
        raise CheckpointError(f"{model} is gated: accept its terms on the Hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the Hub has no model {model!r} that this machine may read (private ones need HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model} has no revision {revision!r} on the Hub") from error
    except HFValidationError as error:
        raise CheckpointError(f"{key}: {model!r} is no folder and no valid Hub id: {error}") from error
    except (requests.RequestException, OfflineModeIsEnabled) as error:
        option = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"{model}{at} is not in this machine's cache and the Hub cannot be reached ({type(error).__name__}). On a "
            f"machine with internet run `hf download {model}{option} --local-dir DIR`, copy DIR here and set "
            f"{key}: DIR"
        ) from error


def _validate(path: Path, key: str, quantization: str) -> tuple[int, ...]:
    config = _read_json(path / "config.json")
    model_type = config.get("model_type")
    if model_type != MODEL_TYPE:
        raise CheckpointError(f"{path} is a {model_type} checkpoint; Shardscribe runs {MODEL_TYPE}")
    thinker = config.get("thinker_config", {})
    is_aligner = "forced_aligner" in str(thinker.get("model_type", ""))
    if is_aligner and key != _ALIGNER:
        raise CheckpointError(
            f"{path} is a {thinker['model_type']} checkpoint, which writes no text: it goes under engine.aligner"
        )
    if not is_aligner and key == _ALIGNER:
        raise CheckpointError(f"{path} is no forced aligner; engine.aligner takes Qwen/Qwen3-ForcedAligner-0.6B")
    for file in weight_files(path):
        _check_complete(file)
    if quantization == "none":
        _require_unquantized(path, config)
    _require_files(path)
    return () if is_aligner else _end_token_ids(path, config)


def _require_unquantized(path: Path, config: dict[str, Any]) -> None:
    """An INT4 checkpoint, run as if it were none, would give wrong texts without a word."""
    if sign := sign_of_quantization(path, config):
        raise CheckpointError(
            f"{path} is quantized ({sign}); without engine.quantization: int4 it would run unquantized. Set that, or "
            "use the unquantized checkpoint"
        )


def sign_of_quantization(path: Path, config: dict[str, Any] | None = None) -> str | None:
    """What tells of a folder that its weights are quantized; None for one that is not."""
    config = config or _read_json(path / "config.json")
    signs = [name for name in INT4_FILES if (path / name).exists()]
    if "quantization_config" in config:
        signs.append(
            f"config.json: quantization_config: {config['quantization_config'].get('quant_method', 'unknown')}"
        )
    signs += sorted(name for name in weight_names(path) if re.search(r"quantizer|weight_scale|qweight|int4_", name))
    return signs[0] if signs else None


def weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = [path / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    else:
        files = [path / "model.safetensors"]
    if all(file.is_file() for file in files):
        return files
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles and not index.is_file():
        raise CheckpointError(
            f"{path} has its weights as pickles only ({', '.join(pickles)}), which are never loaded: reading one runs "
            "code. Convert them to model.safetensors"
        )
    missing = ", ".join(file.name for file in files if not file.is_file())
    raise CheckpointError(f"{path} lacks weights: {missing}. Copy or download the checkpoint again")


def _header_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        start = stream.read(8)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > min(_MAX_HEADER_BYTES, file.stat().st_size - 8):
        reason = "a git-lfs pointer, not the file" if start == b"version " else "no safetensors file, or cut short"
        raise CheckpointError(f"{file} is {reason}. Download it again")
    return size


def _header(file: Path) -> dict[str, Any]:
    size = _header_bytes(file)
    with file.open("rb") as stream:
        stream.seek(8)
        return _parse_json(stream.read(size), file)


def _check_complete(file: Path) -> None:
    ends = [entry["data_offsets"][1] for name, entry in _header(file).items() if name != "__metadata__"]
    expected = 8 + _header_bytes(file) + max(ends, default=0)
    actual = file.stat().st_size
    if actual != expected:
        raise CheckpointError(f"{file} has {actual} bytes instead of {expected}. Download it again")


def _require_files(path: Path) -> None:
    wanted = [
        "preprocessor_config.json",
        "tokenizer_config.json",
        "tokenizer.json|vocab.json",
        "tokenizer.json|merges.txt",
        "chat_template.json|chat_template.jinja",
    ]
    missing = [names for names in wanted if not any((path / name).is_file() for name in names.split("|"))]
    if missing:
        missing = [names.replace("|", " or ") for names in missing]
        raise CheckpointError(f"{path} lacks {', '.join(missing)}. Copy them from the model that it was made from")


def _end_token_ids(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """From generation_config.json, else config.json, else the tokenizer's ids of `<|im_end|>` and `<|endoftext|>`."""
    text_config = config.get("thinker_config", {}).get("text_config", {})
    generation_file = path / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.is_file() else {}
    for source, value in (
        ("generation_config.json: eos_token_id", generation.get("eos_token_id")),
        ("config.json: eos_token_id", config.get("eos_token_id")),
        ("tokenizer_config.json: added_tokens_decoder", list(_tokenizer_end_ids(path))),
    ):
        ids = [value] if isinstance(value, int) else list(value or [])
        if not ids:
            continue
        vocab_size = text_config.get("vocab_size", 0)
        if outside := [token for token in ids if not 0 <= token < vocab_size]:
            raise CheckpointError(f"{path}: {source} has {outside}, outside of the vocabulary of {vocab_size}")
        return tuple(ids)
    raise CheckpointError(f"{path} names no end token: generation_config.json lacks eos_token_id")


def _tokenizer_end_ids(path: Path) -> Iterator[int]:
    added = _read_json(path / "tokenizer_config.json").get("added_tokens_decoder", {})
    ids = {token["content"]: int(token_id) for token_id, token in added.items()}
    return (ids[token] for token in _END_TOKENS if token in ids)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file.parent} is no checkpoint: it has no {file.name}")
    return _parse_json(file.read_bytes(), file)


def _parse_json(text: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: {type(value).__name__} instead of an object")
    return value
