"""What the family is judged and shown on: held-out sets, sample shards for the demo, and long recordings.

Voices, sentences and the digit speaker of all of them never occur in training. The sets are shipped as Opus in
WebDataset shards, so that everyone measures on the same audio; what a shard holds is what the figures of the model card
are about.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import soundfile

from pipeline.embedded.examples import Examples
from pipeline.embedded.grammar import LANGUAGES
from pipeline.embedded.speech import (
    ACCENTS,
    DIGITS_TEST_SPEAKER,
    TEST_VARIANTS,
    Bank,
    DigitClip,
    digit_string,
    sentences,
    speak,
    speak_all,
    write_bank,
)
from pipeline.schema import SAMPLE_RATE_HZ

SENTENCES = 150  # of a language's held-out set
WINDOWS = 12  # of several sentences joined, up to 29 s
DIGIT_STRINGS = 150
CODES = {"English": "en", "Vietnamese": "vi", "Chinese": "zh"}
CODECS = ("wav", "flac", "mp3", "ogg", "m4a", "opus")
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
OPUS_COMPRESSION = 0.928  # 24 kbit/s: libsndfile maps 0 to 1 on 256 to 6


@dataclass(frozen=True, slots=True)
class Item:
    """One sample of a shard: float32 or int16 audio `[num_samples]` at 16 kHz and its labels."""

    key: str
    audio: np.ndarray
    text: str
    language: str
    sentences: Sequence[dict[str, object]] = ()


def heldout_sets(work: Path, digits: dict[str, dict[int, list[DigitClip]]], seed: int) -> dict[str, list[Item]]:
    """set -> items: a set of sentences a language, `windows` of joined ones, and the unheard speaker's `digits`."""
    banks: dict[str, Bank] = {}
    for language in LANGUAGES:
        folder = work / "banks" / "test" / language
        write_bank(folder, speak_all(language, "test", SENTENCES, seed))
        banks[language] = Bank(folder)
    draw = Examples(banks, digits, seed + 1)
    sets: dict[str, list[Item]] = {}
    windows: list[Item] = []
    for language, bank in banks.items():
        code = CODES[language]
        sets[language.lower()] = [
            Item(f"{code}-{i:03d}", draw.distort(bank.pcm(i) / 32768.0), utterance.text, language)
            for i, utterance in enumerate(bank.utterances)
        ]
        for i in range(WINDOWS):
            text, pcm = draw.joined(bank, language, draw.rng.uniform(14.0, 28.0))
            windows.append(Item(f"{code}-{i:03d}", draw.distort(pcm / 32768.0), text, language))
    sets["windows"] = windows
    clips = digits[DIGITS_TEST_SPEAKER]
    strings = [digit_string(clips, draw.rng, draw.rng.randint(3, 8)) for _ in range(DIGIT_STRINGS)]
    sets["digits"] = [
        Item(f"digits-{i:03d}", draw.distort(pcm / 32768.0), text, "English") for i, (text, pcm) in enumerate(strings)
    ]
    return sets


def long_recording(key: str, language: str, duration_s: float, seed: int) -> Item:
    """At least `duration_s` of unheard sentences in unheard voices, a few paragraphs a voice, over faint noise.

    The item's `sentences` say where each is: text, offset, duration in seconds. Pauses are 0.35 to 0.9 s between
    sentences and longer between paragraphs.
    """
    rng = random.Random(f"{seed}-{key}")
    texts = sentences(language, "test", 100_000, rng)
    pieces, times, position = [np.zeros(SAMPLE_RATE_HZ // 2, dtype=np.int16)], [], SAMPLE_RATE_HZ // 2
    voice, pace, pitch = "", 0, 0
    for number in itertools.count():
        if number % 12 == 0:
            voice = f"{rng.choice(ACCENTS[language])}+{rng.choice(TEST_VARIANTS)}"
            pace, pitch = rng.randint(140, 190), rng.randint(30, 70)
        text = next(texts)
        pcm = speak(language, text, voice, pace, pitch)
        if pcm is None:
            continue
        times.append(
            {
                "text": text,
                "offset": round(position / SAMPLE_RATE_HZ, 3),
                "duration": round(len(pcm) / SAMPLE_RATE_HZ, 3),
            }
        )
        pause = np.zeros(int(rng.uniform(0.35, 0.9) * SAMPLE_RATE_HZ) + (number % 12 == 11) * SAMPLE_RATE_HZ, np.int16)
        pieces += [pcm, pause]
        position += len(pcm) + len(pause)
        if position >= duration_s * SAMPLE_RATE_HZ:
            break
    audio = np.concatenate(pieces).astype(np.float32) / 32768.0
    audio *= 0.5 / np.abs(audio).max()
    audio += 10 ** (-45 / 20) * np.std(audio) * np.random.default_rng(seed).standard_normal(len(audio))
    text = ("" if language == "Chinese" else " ").join(str(time["text"]) for time in times)
    return Item(key, audio, text, language, times)


def write_samples(folder: Path, sets: dict[str, list[Item]], seed: int) -> None:
    """The demo's shards: some of each held-out set in every codec, and one long recording."""
    mixed = list(itertools.chain.from_iterable(sets[name][:12] for name in ("english", "vietnamese", "chinese")))
    mixed += sets["digits"][:6]
    random.Random(seed).shuffle(mixed)
    codecs = itertools.cycle(CODECS)
    encoded = [(item, next(codecs)) for item in mixed]
    half = len(encoded) // 2
    write_shard(folder / "mixed-00000.tar", encoded[:half])
    write_shard(folder / "mixed-00001.tar", encoded[half:])
    write_shard(folder / "long-00000.tar", [(long_recording("en-long", "English", 8 * 60 + 15, seed), "opus")])


def write_shard(path: Path, items: Iterable[tuple[Item, str]]) -> None:
    """A WebDataset tar of `KEY.<codec>` and, of items with a language, `KEY.json`; byte for byte the same for the same
    items."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for item, codec in items:
            files = [(codec, encode(item.audio, codec))]
            if item.language:
                label: dict[str, object] = {"text": item.text, "language": item.language}
                if item.sentences:
                    label["sentences"] = list(item.sentences)
                files.append(("json", json.dumps(label, ensure_ascii=False).encode()))
            for suffix, data in files:
                info = tarfile.TarInfo(f"{item.key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def encode(audio: np.ndarray, codec: str) -> bytes:
    """Audio in [-1, 1] at 16 kHz as a file of `codec` (a key of `CODECS`)."""
    buffer = io.BytesIO()
    if codec == "m4a":
        _encode_aac(audio, buffer)
        return buffer.getvalue()
    formats = {"ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"), "mp3": ("MP3", "MPEG_LAYER_III")}
    container, subtype = formats.get(codec, (codec.upper(), "PCM_16"))
    options = {"compression_level": OPUS_COMPRESSION} if codec == "opus" else {}
    soundfile.write(buffer, np.clip(audio, -1, 1), SAMPLE_RATE_HZ, format=container, subtype=subtype, **options)
    return _with_fixed_serial(buffer.getvalue()) if container == "OGG" else buffer.getvalue()


def _with_fixed_serial(ogg: bytes) -> bytes:
    """The same Ogg stream, its serial number 1: libsndfile draws one from the clock. Pages: RFC 3533, section 6."""
    data = bytearray(ogg)
    start = 0
    while start < len(data):
        num_segments = data[start + 26]
        body = start + 27 + num_segments
        end = body + sum(data[start + 27 : body])
        data[start + 14 : start + 18] = (1).to_bytes(4, "little")
        data[start + 22 : start + 26] = bytes(4)  # the checksum is taken with zeros in its own place
        data[start + 22 : start + 26] = _ogg_checksum(data[start:end]).to_bytes(4, "little")
        start = end
    return bytes(data)


def _ogg_checksum(page: bytes | bytearray) -> int:
    """CRC-32 with the highest bit first, no start value and no final xor: zlib's with all that mirrored and undone."""
    checksum = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{checksum:032b}"[::-1], 2)


def _encode_aac(audio: np.ndarray, buffer: io.BytesIO) -> None:
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
        frame = av.AudioFrame.from_ndarray(audio.astype(np.float32)[None], format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        frame.pts = 0  # without it the file does not say that AAC begins 64 ms early, and decodes late
        for packet in itertools.chain(stream.encode(frame), stream.encode(None)):
            container.mux(packet)
