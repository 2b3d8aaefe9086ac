from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.engine import checkpoint
from pipeline.engine.checkpoint import CheckpointError, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_local_folder_is_named_by_its_content(folder: Path) -> None:
    first = resolve(str(folder))
    assert (first.path, first.model_id) == (folder.resolve(), str(folder))
    assert resolve(str(folder)).revision == first.revision
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1  # same size and header, another training
    weights.write_bytes(data)
    assert resolve(str(folder)).revision != first.revision
    edited = resolve(str(folder)).revision
    edit_json(folder / "generation_config.json", eos_token_id=[7])
    assert resolve(str(folder)).revision != edited


def test_a_hub_snapshot_is_named_by_its_commit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = folder.rename(tmp_path / COMMIT)
    asked: list[tuple[str, str | None]] = []

    def download(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert "*.bin" not in allow_patterns
        asked.append((model, revision))
        return str(snapshot)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    found = resolve("Qwen/Qwen3-ASR-0.6B", "main")
    assert (found.model_id, found.revision, found.path) == ("Qwen/Qwen3-ASR-0.6B", COMMIT, snapshot)
    assert asked == [("Qwen/Qwen3-ASR-0.6B", "main")]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), requests.ConnectionError("no route")])
def test_an_unreachable_hub_says_how_to_bring_the_snapshot(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    with pytest.raises(CheckpointError) as caught:
        resolve("Qwen/Qwen3-ASR-0.6B", "v1")
    assert "hf download Qwen/Qwen3-ASR-0.6B --revision v1 --local-dir DIR" in str(caught.value)
    assert "engine.model: DIR" in str(caught.value)


def test_a_cached_snapshot_is_enough_without_a_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real huggingface_hub over a cache laid out as it lays it out."""
    repo = tmp_path / "cache" / "models--Qwen--Qwen3-ASR-0.6B"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    folder.rename(repo / "snapshots" / COMMIT)

    def offline(*args: Any, **kwargs: Any) -> str:
        return str(snapshot_download(*args, **kwargs, cache_dir=tmp_path / "cache", endpoint="http://127.0.0.1:9"))

    monkeypatch.setattr(checkpoint, "snapshot_download", offline)
    assert resolve("Qwen/Qwen3-ASR-0.6B").revision == COMMIT
    with pytest.raises(CheckpointError, match="is not in this machine's cache and the Hub cannot be reached"):
        resolve("Qwen/Qwen3-ASR-1.7B")


def test_embedded_models_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EMBEDDED_FOLDER", tmp_path)
    folder.rename(tmp_path / "student")
    assert resolve("embedded/student").model_id == "embedded/student"
    with pytest.raises(CheckpointError, match="there is no 'embedded/studnet'; embedded models: embedded/student$"):
        resolve("embedded/studnet")


@pytest.mark.parametrize("model", ["/no/such/folder", "./model", "student", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(CheckpointError, match="is no folder on this machine and no Hub id"):
        resolve(model)


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"engine.revision: 'main' is for Hub ids"):
        resolve(str(folder), "main")


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def _missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def _quantizer_tensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"thinker.model.layers.0.mlp.up_proj.weight_scale": torch.ones(2)}, folder / "model.safetensors")


def _no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "merges.txt"):
        (folder / name).unlink()


def _forced_aligner(folder: Path) -> None:
    thinker = json.loads((folder / "config.json").read_text())["thinker_config"]
    edit_json(folder / "config.json", thinker_config=thinker | {"model_type": "qwen3_forced_aligner"})


REFUSALS: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "config.json").unlink(), "is no checkpoint: it has no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    (lambda folder: edit_json(folder / "config.json", model_type="whisper"), "is a whisper checkpoint; .* qwen3_asr"),
    (lambda folder: edit_json(folder / "config.json", model_type="qwen3_omni_moe"), "is a qwen3_omni_moe checkpoint"),
    (_forced_aligner, "qwen3_forced_aligner checkpoint, which writes no text: it goes under engine.aligner"),
    (_only_pickles, r"pickles only \(pytorch_model.bin\), which are never loaded"),
    (lambda folder: (folder / "model.safetensors").unlink(), "lacks weights: model.safetensors"),
    (_missing_shard, "lacks weights: model-00002-of-00002.safetensors"),
    (_truncated, r"has \d+ bytes instead of \d+. Download it again"),
    (_lfs_pointer, "is a git-lfs pointer"),
    (lambda folder: (folder / "modelopt_state.pth").touch(), r"is quantized \(modelopt_state.pth\)"),
    (lambda folder: (folder / "hf_quant_config.json").touch(), r"is quantized \(hf_quant_config.json\)"),
    (
        lambda folder: edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"}),
        r"quantized .config.json: quantization_config: gptq",
    ),
    (_quantizer_tensors, r"is quantized .*weight_scale"),
    (lambda folder: (folder / "preprocessor_config.json").unlink(), "lacks preprocessor_config.json"),
    (lambda folder: (folder / "tokenizer_config.json").unlink(), "lacks tokenizer_config.json"),
    (lambda folder: (folder / "chat_template.jinja").unlink(), "lacks chat_template.json or chat_template.jinja"),
    (_no_tokenizer, "lacks tokenizer.json or merges.txt"),
    (
        lambda folder: edit_json(folder / "generation_config.json", eos_token_id=[5, 151645]),
        r"generation_config.json: eos_token_id has \[151645\], outside of the vocabulary of 320",
    ),
]


@pytest.mark.parametrize(("damage", "message"), REFUSALS)
def test_refusals_say_what_is_wrong(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(str(folder))
    assert str(folder) in str(caught.value)


def test_pickles_beside_safetensors_do_not_matter(folder: Path) -> None:
    (folder / "optimizer.pt").touch()
    resolve(str(folder))


def test_end_tokens_come_from_the_first_file_that_names_them(folder: Path) -> None:
    tokens = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    ids = {token["content"]: int(token_id) for token_id, token in tokens.items()}
    end_tokens = (ids["<|im_end|>"], ids["<|endoftext|>"])
    assert resolve(str(folder)).eos_token_ids == end_tokens
    edit_json(folder / "generation_config.json", eos_token_id=11)
    assert resolve(str(folder)).eos_token_ids == (11,)
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=[12, 13])
    assert resolve(str(folder)).eos_token_ids == (12, 13)
    edit_json(folder / "config.json", eos_token_id=None)
    assert resolve(str(folder)).eos_token_ids == end_tokens
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={})
    with pytest.raises(CheckpointError, match="names no end token"):
        resolve(str(folder))
