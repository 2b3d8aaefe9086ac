"""Examples from manifests and pseudo-labels: what is read, where its audio is found, what is said when it is not."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from rich.console import Console

from jobs.transcribe import run
from pipeline.config import ConfigError, TranscribeConfig
from pipeline.distill.audio import Loader
from pipeline.distill.examples import ExampleRef, read_examples
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.storage import Options, StorageError
from tests.distill.sources import HELDOUT, heldout, write_manifest
from tests.engine.tiny import noise


def manifest(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def line(name: str, **changes: Any) -> dict[str, Any]:
    return {"audio_filepath": name, "offset": 0.5, "duration": 1.5, "text": "a b", "lang": "en"} | changes


def test_a_manifest_gives_its_lines(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(3.0), SAMPLE_RATE_HZ)
    path = manifest(tmp_path / "m.jsonl", line("a.wav"), line("a.wav", lang="Vietnamese", offset=1.0, duration=2.0))
    first, second = read_examples([path], {})
    assert first == ExampleRef(f"{path}#1", f"{tmp_path}/a.wav", 0.5, 1.5, "a b", "English", f"{tmp_path}/a.wav")
    loader = pickle.loads(pickle.dumps(Loader({})))
    assert np.array_equal(loader.load(first).pcm, noise(3.0)[8000:32000])
    assert np.array_equal(loader.load(second).pcm, noise(3.0)[16000:])
    assert [ref.language for ref in read_examples([path], {}, ["vi"])] == ["Vietnamese"]
    assert [ref.duration_s for ref in read_examples([path], {}, max_s=1.9)] == [1.5]


def test_a_manifest_may_name_members_of_tars(tmp_path: Path) -> None:
    refs = read_examples([str(write_manifest(tmp_path / "m.jsonl", 3))], {})
    assert [ref.language for ref in refs] == [language for language in HELDOUT for _ in range(3)]
    loader = Loader({})
    for ref, (_, pcm, text, _) in zip(refs[:3], heldout("english", 3), strict=True):
        assert np.array_equal(loader.load(ref).pcm, pcm) and ref.text == text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line("a.wav", lang=None)], r"m.jsonl:1 has no lang, which"),
        ([line("a.wav"), {"audio_filepath": "a"}], r"m.jsonl:2 has no duration and no text and no lang, which"),
        ([{"audio": "a"}], r"m.jsonl:1 has no audio_filepath; its keys are audio"),
        ([], r"m.jsonl has no line: there is nothing to learn from"),
        ([line("a.wav", duration=31)], r"no examples of any language from 0 to 30 s; there are none"),
    ],
)
def test_a_manifest_that_is_none_for_training(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_examples([manifest(tmp_path / "m.jsonl", *lines)], {})


def test_a_language_that_is_missing_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = manifest(tmp_path / "m.jsonl", line("a.wav"), line("a.wav", lang="de"))
    with pytest.raises(ConfigError, match="no examples of Thai and Vietnamese .* there are English, German"):
        read_examples([path], {}, ["en", "th", "Vietnamese"])


def test_a_source_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is neither a NeMo manifest .* nor an output"):
        read_examples([str(tmp_path)], {})


def transcribed(inputs: list[Any], out: Path, checkpoint: Path, **sections: Any) -> TranscribeConfig:
    """A job's output whose rows are all kept: the tiny checkpoint writes nonsense."""
    off = {"min_avg_logprob": None, "max_compression_ratio": None, "max_char_rate": None}
    engine = {"model": str(checkpoint), "max_new_tokens": 8, "name": "offline", "device": "cpu", "language": "English"}
    document = {"inputs": inputs, "output": str(out), "labels": off, "engine": engine} | sections
    config = TranscribeConfig.model_validate(document)
    assert run(config, Console(quiet=True)) == 0
    edit(out, keep=True, text="some words", language="English")
    return config


def edit(out: Path, **values: Any) -> None:
    for file in (out / "transcripts").iterdir():
        table = pq.read_table(file)
        for name, value in values.items():
            at = table.schema.get_field_index(name)
            table = table.set_column(
                at, table.schema.field(at), pa.array([value] * len(table), table.schema.field(at).type)
            )
        pq.write_table(table, file)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same two recordings, of two channels and 70 s and of 2 s, in a tar, in Parquet, as files, in a manifest."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "files").mkdir()
    long = np.stack([noise(70.0, 1), noise(70.0, 2)], axis=1)
    soundfile.write(folder / "files" / "long.flac", long, SAMPLE_RATE_HZ)
    soundfile.write(folder / "files" / "short.wav", noise(2.0, 3), SAMPLE_RATE_HZ)
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name in ("long.flac", "short.wav", "short.wav"):  # the second of a name is another recording
            tar.add(folder / "files" / name, name)
    files = [{"bytes": (folder / "files" / name).read_bytes(), "path": name} for name in ("long.flac", "short.wav")]
    pq.write_table(pa.table({"speech": files}), folder / "x.parquet", row_group_size=1)
    manifest(folder / "m.jsonl", {"audio_filepath": "files/long.flac", "offset": 3.0, "duration": 20.0})
    return folder


@pytest.fixture(scope="module")
def output(inputs: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    out = tmp_path_factory.mktemp("labels") / "out"
    parquet = {"path": str(inputs / "x.parquet"), "audio_column": "speech"}
    sources = [str(inputs / "x.tar"), parquet, str(inputs / "files"), str(inputs / "m.jsonl")]
    transcribed(sources, out, tiny_checkpoint, audio={"channels": "split"})
    return out


def test_pseudo_labels_find_their_audio_wherever_it_was_read(output: Path, tiny_checkpoint: Path) -> None:
    refs = read_examples([str(output)], {})
    assert {ref.audio.rpartition("/")[2] for ref in refs} == {"long.flac", "short.wav"}
    loader = Loader({})
    whole = np.stack([noise(70.0, 1), noise(70.0, 2)])
    num_long = 0
    for ref in refs:
        pcm = loader.load(ref).pcm
        assert ref.text == "some words" and ref.teacher.startswith(f"{tiny_checkpoint}@") and len(ref.token_ids)
        if "long" in ref.audio:
            start = round(ref.offset_s * SAMPLE_RATE_HZ)
            num_long += 1
            assert np.array_equal(pcm, whole[ref.channel or 0, start : start + len(pcm)])
        else:
            assert np.array_equal(pcm, noise(2.0, 3)) and ref.channel == 0
        assert len(pcm) == round(ref.duration_s * SAMPLE_RATE_HZ)
    assert num_long >= 3 * 2 * 3 + 2, "from tar, Parquet and file, two channels, at least three segments; a manifest"
    assert sum(ref.audio.endswith("x.tar/short.wav") for ref in refs) == 2


def test_examples_on_s3(inputs: Path, s3_options: Options) -> None:
    fs = fsspec.filesystem("s3", **s3_options["s3"])
    fs.mkdir("speech")
    for name in ("x.tar", "files/short.wav", "x.parquet"):
        fs.put_file(str(inputs / name), f"speech/{name}")
    names = ["x.tar/short.wav", "files/short.wav", "s3://speech/x.parquet#1/short.wav"]
    lines = "".join(json.dumps(line(name, offset=0.5, duration=1.0)) + "\n" for name in names)
    fs.pipe_file("speech/m.jsonl", lines.encode())
    loader = Loader(s3_options)
    for ref in read_examples(["s3://speech/m.jsonl"], s3_options):
        ref = replace(ref, audio_columns=("speech",))
        assert np.array_equal(loader.load(ref).pcm, noise(2.0, 3)[8000:24000])
    fs.rm_file("speech/files/short.wav")
    with pytest.raises(StorageError, match=r"m.jsonl#2: s3://speech/files/short.wav: no such file"):
        Loader(s3_options).load(read_examples(["s3://speech/m.jsonl"], s3_options)[1])


def test_only_rows_to_keep_are_read(output: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(output, tmp_path / "out"))
    edit(copied, keep=False)
    with pytest.raises(ConfigError, match="has no row with `keep`: there is nothing to learn from"):
        read_examples([str(copied)], {})


def one(output: Path, audio: str) -> ExampleRef:
    return next(ref for ref in read_examples([str(output)], {}) if ref.audio.endswith(audio))


def test_audio_that_is_gone_or_changed_is_named(output: Path, inputs: Path, tmp_path: Path) -> None:
    of_file, of_tar = one(output, "files/short.wav"), one(output, "x.tar/short.wav")
    of_row = one(output, "x.parquet#1/short.wav")
    cut = Path(shutil.copyfile(inputs / "files" / "short.wav", tmp_path / "short.wav"))
    cut.write_bytes(cut.read_bytes()[:20_000])
    other = Path(shutil.copyfile(inputs / "x.tar", tmp_path / "x.tar"))
    zipped = tmp_path / "z.tar"
    zipped.write_bytes(gzip.compress(other.read_bytes()))
    for ref, message in [
        (replace(of_file, audio=f"{tmp_path}/gone.wav"), "gone.wav: no such file"),
        (replace(of_file, audio=str(cut)), r"cannot be decoded \(truncated: "),
        (
            replace(of_file, duration_s=9.0),
            r"has 2.00 s of audio from 0 s on where 9.00 s are labelled: it has changed",
        ),
        (replace(of_file, channel=1), "has no channel 1 any more"),
        (replace(of_tar, audio=f"{other}/short.wav"), "x.tar has changed since it was transcribed"),
        (replace(of_tar, recording_id=f"{inputs}/x.tar/none.wav"), "x.tar has no none.wav any more"),
        (
            replace(of_tar, audio=f"{zipped}/short.wav", split_id="", recording_id=f"{zipped}/short.wav"),
            "is compressed",
        ),
        (replace(of_row, audio=f"{inputs}/x.parquet#9"), "has no row 9 with a column audio or speech any more"),
        (replace(of_row, audio_columns=("audio",)), "has no row 1 with a column audio any more"),
    ]:
        with pytest.raises(StorageError, match=message) as caught:
            Loader({}).load(ref)
        assert str(caught.value).startswith(f"{ref.example_id}: ")
