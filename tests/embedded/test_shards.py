"""What the family is judged on: codecs, shards, long recordings."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.audio import decode
from pipeline.embedded.shards import CODECS, Item, encode, long_recording, write_samples, write_shard
from pipeline.embedded.speech import TEST_VARIANTS, VARIANTS, set_of
from pipeline.schema import SAMPLE_RATE_HZ
from tests.engine.tiny import noise

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


def sweep(seconds: float) -> np.ndarray:
    """A rising tone under a slow envelope, as codecs for speech keep it: float32 in [-1, 1]."""
    time_s = np.arange(int(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    tone = np.sin(2 * np.pi * (300 + 200 * time_s) * time_s)
    return (0.5 * tone * (0.6 + 0.4 * np.sin(2 * np.pi * 1.7 * time_s))).astype(np.float32)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seconds", [0.4, 3.7])
def test_every_codec_gives_back_what_went_in(codec: str, seconds: float) -> None:
    audio = sweep(seconds)
    pcm = np.concatenate(list(decode(encode(audio, codec))))[:, 0] / 32768.0
    assert abs(len(pcm) - len(audio)) <= 0.1 * SAMPLE_RATE_HZ
    size = 1 << 17
    correlation = np.fft.irfft(np.fft.rfft(pcm, size) * np.conj(np.fft.rfft(audio, size)), size)
    assert correlation.max() / (np.linalg.norm(pcm) * np.linalg.norm(audio)) > 0.97, "and sounds the same"
    lag = int(correlation.argmax())
    assert min(lag, size - lag) < 0.005 * SAMPLE_RATE_HZ, "at the same time"


def test_loud_audio_is_clipped_not_wrapped() -> None:
    pcm = np.concatenate(list(decode(encode(np.full(1600, 1.5, np.float32), "wav"))))
    assert set(pcm[:, 0]) == {32767}


def test_opus_is_small() -> None:
    audio = noise(5.0) / 32768.0
    assert len(encode(audio, "opus")) < 5.0 * 40_000 / 8 < len(encode(audio, "flac"))


def items() -> list[tuple[Item, str]]:
    return [(Item(f"k-{codec}", sweep(0.7), f"text của {codec}", "Vietnamese"), codec) for codec in CODECS]


def test_a_shard_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name / "x.tar", items())
    assert (tmp_path / "a" / "x.tar").read_bytes() == (tmp_path / "b" / "x.tar").read_bytes()


def test_ogg_pages_keep_valid_checksums() -> None:
    """libsndfile passes over pages whose checksum is wrong, so that a wrong one would be silence."""
    for codec in ("ogg", "opus"):
        data = encode(sweep(2.0), codec)
        samples, _ = soundfile.read(io.BytesIO(data))
        assert np.std(samples) > 0.1
        broken = bytearray(data)
        broken[-20] ^= 0xFF
        assert len(soundfile.read(io.BytesIO(bytes(broken)))[0]) < len(samples), "a checksum is looked at"


def test_a_shard_holds_audio_and_labels(tmp_path: Path) -> None:
    sentence = {"text": "một", "offset": 0.0, "duration": 0.7}
    write_shard(tmp_path / "x.tar", [*items(), (Item("long", sweep(0.7), "một", "Vietnamese", [sentence]), "wav")])
    with tarfile.open(tmp_path / "x.tar") as tar:
        names = tar.getnames()
        assert names[:2] == ["k-wav.wav", "k-wav.json"] and len(names) == 2 * (len(CODECS) + 1)
        labels = {name: json.load(tar.extractfile(name)) for name in names if name.endswith(".json")}  # type: ignore[arg-type]
    assert labels["k-mp3.json"] == {"text": "text của mp3", "language": "Vietnamese"}
    assert labels["long.json"]["sentences"] == [sentence]


def test_samples_hold_some_of_every_set_in_every_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pipeline.embedded.shards.long_recording", lambda key, language, *_: Item(key, sweep(1.0), "long", language)
    )
    names = ("english", "vietnamese", "chinese", "digits")
    sets = {name: [Item(f"{name}-{i:03d}", sweep(0.3), name, "English") for i in range(20)] for name in names}
    write_samples(tmp_path, sets, seed=1)
    found = {}
    for shard in tmp_path.iterdir():
        with tarfile.open(shard) as tar:
            found[shard.name] = [name for name in tar.getnames() if not name.endswith(".json")]
    assert found.pop("long-00000.tar") == ["en-long.opus"]
    mixed = [name for names in found.values() for name in names]
    assert len(mixed) == len(set(mixed)) == 42 and all(len(names) == 21 for names in found.values())
    assert {name.rpartition(".")[2] for name in mixed} == set(CODECS)


@needs_espeak
def test_a_long_recording_says_where_its_sentences_are() -> None:
    item = long_recording("en-long", "English", 25.0, seed=4)
    assert 25.0 <= len(item.audio) / SAMPLE_RATE_HZ < 40.0 and 0.4 < np.abs(item.audio).max() < 0.6
    assert item.text == " ".join(str(sentence["text"]) for sentence in item.sentences)
    speech = np.zeros(len(item.audio), bool)
    end = 0.0
    for sentence in item.sentences:
        offset, duration = float(str(sentence["offset"])), float(str(sentence["duration"]))
        assert offset >= end + 0.3 and set_of(str(sentence["text"])) == "test"
        end = offset + duration
        inside = slice(round(offset * SAMPLE_RATE_HZ), round(end * SAMPLE_RATE_HZ))
        speech[inside] = True
        assert np.std(item.audio[inside]) > 20 * np.std(item.audio[inside.stop + 200 : inside.stop + 4000])
    assert end < len(item.audio) / SAMPLE_RATE_HZ
    assert np.std(item.audio[speech]) > 20 * np.std(item.audio[~speech])
    again = long_recording("en-long", "English", 25.0, seed=4)
    assert again.text == item.text and np.array_equal(again.audio, item.audio)


def test_the_voices_of_the_sets_are_never_trained_on() -> None:
    assert not set(TEST_VARIANTS) & (set(VARIANTS["train"]) | set(VARIANTS["dev"]))
