"""Speech for the embedded family: sentences spoken by espeak-ng, and digit strings joined from real recordings.

A *bank* is one memory-mapped file of clean int16 speech at 16 kHz with an index; noise, rooms and telephone bands are
added when an example is drawn (`pipeline.embedded.examples`), so that one bank gives ever new examples.

Voices and sentences of the held-out sets never occur in training: every espeak variant belongs to exactly one set, and
so does every sentence (by a hash of its text) and every digit speaker.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from pipeline.embedded.grammar import sentence
from pipeline.schema import SAMPLE_RATE_HZ

ESPEAK_RATE_HZ = 22_050

ACCENTS = {
    "English": ("en-us", "en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-029"),
    "Vietnamese": ("vi",),  # the northern voice: the southern ones merge tones that the writing keeps apart
    "Chinese": ("cmn-latn-pinyin",),  # espeak-ng's Mandarin reads pinyin; `_spoken` converts
}
TEST_VARIANTS = ("f3", "m4", "Andrea", "Mario", "anika", "steph", "steph2", "steph3", "victor", "Hugo")
DEV_VARIANTS = ("f2", "m6", "belinda", "paul")
TRAIN_VARIANTS = (
    "f1", "f4", "f5", "m1", "m2", "m3", "m5", "m7", "m8", "Alex", "Alicia", "Andy", "Annie", "Denis", "Diogo",
    "Gene", "Gene2", "Henrique", "Jacky", "Lee", "Marco", "Michael", "Mike", "Nguyen", "Storm", "adam", "antonio",
    "aunty", "benjamin", "boris", "caleb", "david", "ed", "edward", "edward2", "grandma", "grandpa", "gustave",
    "iven", "iven2", "iven3", "iven4", "john", "kaukovalta", "linda", "marcelo", "max", "michel", "miguel",
    "norbert", "pablo", "pedro", "quincy", "rob", "robert", "sandro", "shelby", "travis", "zac",
)  # fmt: skip
VARIANTS = {"train": TRAIN_VARIANTS, "dev": DEV_VARIANTS, "test": TEST_VARIANTS}

DIGIT_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGITS_SOURCE = "github.com/Jakobovski/free-spoken-digit-dataset (CC BY-SA 4.0)"
DIGITS_TEST_SPEAKER = "theo"


@dataclass(frozen=True, slots=True)
class Utterance:
    """One clean utterance of a bank: samples `[start, start + num_samples)` of its audio file."""

    language: str
    text: str
    voice: str
    start: int
    num_samples: int


class Bank:
    """Clean speech on disk: `audio.i16` (raw int16, 16 kHz) and `index.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self.utterances = [Utterance(**json.loads(line)) for line in (folder / "index.jsonl").open()]
        self._audio = np.memmap(folder / "audio.i16", dtype=np.int16, mode="r")

    def __len__(self) -> int:
        return len(self.utterances)

    def pcm(self, index: int) -> np.ndarray:
        """int16 `[num_samples]`."""
        utterance = self.utterances[index]
        return self._audio[utterance.start : utterance.start + utterance.num_samples]


def write_bank(folder: Path, spoken: Iterator[tuple[str, str, str, np.ndarray]]) -> None:
    """Write `(language, text, voice, int16 pcm)` to a new bank; a folder that already holds one is left as it is."""
    if (folder / "index.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    start = 0
    with (folder / "audio.i16").open("wb") as audio:
        for language, text, voice, pcm in spoken:
            audio.write(pcm.tobytes())
            lines.append(json.dumps(asdict(Utterance(language, text, voice, start, len(pcm))), ensure_ascii=False))
            start += len(pcm)
    (folder / "index.jsonl").write_text("\n".join(lines) + "\n")


def set_of(text: str) -> str:
    """The set (train, dev or test) that a sentence belongs to, by its text alone."""
    bucket = hashlib.blake2b(text.encode(), digest_size=2).digest()[0]
    return "test" if bucket < 16 else "dev" if bucket < 24 else "train"


def sentences(language: str, subset: str, count: int, rng: random.Random) -> Iterator[str]:
    """`count` distinct sentences of `subset`."""
    seen: set[str] = set()
    while len(seen) < count:
        text = sentence(language, rng)
        if text not in seen and set_of(text) == subset:
            seen.add(text)
            yield text


def speak_all(
    language: str, subset: str, count: int, seed: int, workers: int = 2
) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """Speak `count` sentences of one language in the voices of `subset`, in a fixed order."""
    rng = random.Random(f"{seed}-{language}-{subset}")
    jobs = [
        (
            text,
            f"{rng.choice(ACCENTS[language])}+{rng.choice(VARIANTS[subset])}",
            rng.randint(130, 210),
            rng.randint(25, 75),
        )
        for text in sentences(language, subset, count, rng)
    ]
    with ThreadPoolExecutor(workers) as pool:
        for (text, voice, _, _), pcm in zip(jobs, pool.map(lambda job: speak(language, *job), jobs), strict=True):
            if pcm is not None:
                yield language, text, voice, pcm


def speak(language: str, text: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray | None:
    """Speak one sentence with espeak-ng: int16 `[num_samples]` at 16 kHz, silence at both ends trimmed to 50 ms.

    None where espeak-ng 1.51 crashes (a few variants do on a few texts, always the same). Raises RuntimeError when it
    is missing or says nothing.
    """
    if shutil.which("espeak-ng") is None:
        raise RuntimeError("espeak-ng is not installed; it speaks the training sentences (Debian: espeak-ng)")
    command = [
        "espeak-ng",
        "-v",
        voice,
        "-s",
        str(words_per_minute),
        "-p",
        str(pitch),
        "--stdout",
        _spoken(language, text),
    ]
    run = subprocess.run(command, capture_output=True)
    if run.returncode < 0:
        return None
    run.check_returncode()
    wav = run.stdout
    samples = np.frombuffer(wav[44 : len(wav) - len(wav) % 2], dtype=np.int16)  # --stdout leaves the sizes unset
    if not samples.any():
        raise RuntimeError(f"espeak-ng said nothing: {' '.join(command)}")
    pcm = soxr.resample(samples, ESPEAK_RATE_HZ, SAMPLE_RATE_HZ)
    return trim(pcm, margin_s=0.05)


def _spoken(language: str, text: str) -> str:
    if language != "Chinese":
        return text
    from pypinyin import Style, lazy_pinyin  # only the recipe needs it

    latin = str.maketrans("。，？！", ".,?!")
    return " ".join(lazy_pinyin(text, style=Style.TONE3, neutral_tone_with_five=True)).translate(latin)


def sounds(language: str, text: str) -> str:
    """What of a text is heard, for the CTC head: lower-case letters (Chinese: pinyin with tone digits) and spaces."""
    return "".join(
        character for character in _spoken(language, text).lower() if character.isalnum() or character == " "
    )


def trim(pcm: np.ndarray, margin_s: float) -> np.ndarray:
    """Cut silence (under 1 % of the peak) at both ends down to `margin_s`."""
    loud = np.flatnonzero(np.abs(pcm.astype(np.int32)) > 0.01 * np.abs(pcm.astype(np.int32)).max())
    margin = int(margin_s * SAMPLE_RATE_HZ)
    return pcm[max(0, loud[0] - margin) : loud[-1] + margin]


@dataclass(frozen=True, slots=True)
class DigitClip:
    digit: int
    speaker: str
    pcm: np.ndarray


def load_digits(folder: Path) -> list[DigitClip]:
    """Real spoken digits from WebDataset shards (`KEY.wav` + `KEY.json` with `text` and `speaker`) under `folder`.

    Source: `DIGITS_SOURCE`. Raises FileNotFoundError when the folder holds no shard.
    """
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise FileNotFoundError(f"no .tar shards in {folder}: pack the digit recordings of {DIGITS_SOURCE} there")
    clips: list[DigitClip] = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
            for name in sorted(files):
                if not name.endswith(".wav"):
                    continue
                label = json.load(files[name.removesuffix(".wav") + ".json"])  # type: ignore[arg-type]
                samples, rate = soundfile.read(io.BytesIO(files[name].read()), dtype="int16")  # type: ignore[union-attr]
                pcm = trim(soxr.resample(samples, rate, SAMPLE_RATE_HZ), margin_s=0.03)
                clips.append(DigitClip(DIGIT_WORDS.index(label["text"].strip().lower()), label["speaker"], pcm))
    return clips


def digit_string(clips: dict[int, list[DigitClip]], rng: random.Random, count: int) -> tuple[str, np.ndarray]:
    """A string of `count` digits of one speaker with pauses of 60 to 350 ms: ("Seven two nine.", int16 pcm)."""
    digits = [rng.randrange(10) for _ in range(count)]
    pieces: list[np.ndarray] = []
    for digit in digits:
        clip = rng.choice(clips[digit])
        # the speakers' levels differ by 20 dB: bring each clip to one level before the string gets its gain
        level = np.sqrt(np.mean(clip.pcm.astype(np.float32) ** 2)) + 1.0
        pieces.append(np.clip(clip.pcm * (2500.0 / level), -32768, 32767).astype(np.int16))
        pieces.append(np.zeros(int(rng.uniform(0.06, 0.35) * SAMPLE_RATE_HZ), dtype=np.int16))
    return " ".join(DIGIT_WORDS[d] for d in digits).capitalize() + ".", np.concatenate(pieces[:-1])
