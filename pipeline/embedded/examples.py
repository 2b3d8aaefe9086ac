"""Training examples from clean banks: sentences joined to windows of up to 30 s, in rooms, noise and telephone bands.

Everything is drawn from one `random.Random` and one numpy generator, so a seed fixes the whole sequence of examples.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from pipeline.embedded.speech import Bank, DigitClip, digit_string
from pipeline.schema import SAMPLE_RATE_HZ

WINDOW_S = 29.5
NUM_FFT_PAD = 4096


@dataclass(frozen=True, slots=True)
class Example:
    """Float32 audio `[num_samples]` in [-1, 1], and what to write for it ("" and language "None" for no speech)."""

    audio: np.ndarray
    text: str
    language: str
    context: str = ""


class Examples:
    """Draws examples in which about half are single sentences and half are several joined, up to a window."""

    def __init__(self, banks: dict[str, Bank], digits: dict[str, dict[int, list[DigitClip]]], seed: int) -> None:
        """`digits` is speaker -> digit -> clips."""
        self.banks = banks
        self.digits = digits
        self.rng = random.Random(seed)
        self.noise_rng = np.random.default_rng(seed)
        self.distortion = 1.0  # factor of the chance of each distortion

    def batch(self, audio_s: float, joined: bool = True, distortion: float = 1.0) -> list[Example]:
        """Examples of like length whose audio adds up to about `audio_s` seconds. Half of the batches hold several
        sentences an example if `joined`, else none; `distortion` scales the chance of each distortion."""
        self.distortion = distortion
        longest = self.rng.choice((0.0, 0.0, 0.0, 10.0, 18.0, WINDOW_S)) if joined else 0.0
        total, batch = 0.0, []
        while total < audio_s:
            batch.append(self.example(0.0 if longest == 0.0 else self.rng.uniform(0.6 * longest, longest)))
            total += len(batch[-1].audio) / SAMPLE_RATE_HZ
        return batch

    def example(self, target_s: float) -> Example:
        """One example of about `target_s` seconds (0: a single sentence), with its distortions."""
        draw = self.rng.random()
        if draw < 0.02:
            seconds = self.rng.uniform(0.5, max(3.0, target_s))
            silence = np.zeros(int(seconds * SAMPLE_RATE_HZ), dtype=np.float32)
            return Example(self._add_noise(silence, quiet=True), "", "None")
        if draw < 0.22:
            text, pcm = self._digits(target_s)
            language = "English"
        else:
            language = self.rng.choice(tuple(self.banks))
            text, pcm = self.joined(self.banks[language], language, target_s, vary=True)
        return Example(self.distort(pcm.astype(np.float32) / 32768.0), text, language, self._context(text, language))

    def joined(self, bank: Bank, language: str, target_s: float, vary: bool = False) -> tuple[str, np.ndarray]:
        """Sentences of a bank with pauses, as many as fit into `target_s` seconds but at least one: text, int16 pcm.
        `vary`: half of the examples in voices that the bank does not hold."""
        texts: list[str] = []
        pieces: list[np.ndarray] = [self._pause(0.0, 0.4)]
        length = len(pieces[0])
        varied = vary and self.rng.random() < 0.5
        while True:
            index = self.rng.randrange(len(bank))
            pcm = self._another_voice(bank.pcm(index), 0.85, 1.18) if varied else bank.pcm(index)
            if texts and length + len(pcm) > target_s * SAMPLE_RATE_HZ:
                break
            pieces += [pcm, self._pause(0.15, 0.9)]
            length += len(pcm) + len(pieces[-1])
            texts.append(bank.utterances[index].text)
            if length >= target_s * SAMPLE_RATE_HZ or length > (WINDOW_S - 1) * SAMPLE_RATE_HZ:
                break
        joined = ("" if language == "Chinese" else " ").join(texts)
        return joined, np.concatenate(pieces)[: int(30 * SAMPLE_RATE_HZ)]

    def _digits(self, target_s: float) -> tuple[str, np.ndarray]:
        clips = self.digits[self.rng.choice(tuple(self.digits))]
        count = self.rng.randint(1, 8)
        texts, pieces, length = [], [self._pause(0.0, 0.4)], 0
        while True:
            text, pcm = digit_string(clips, self.rng, count)
            pcm = self._another_voice(pcm, 0.82, 1.2)
            pieces += [pcm, self._pause(0.3, 0.9)]
            texts.append(text)
            length += len(pcm) + len(pieces[-1])
            if length > min(target_s, WINDOW_S - 8.0) * SAMPLE_RATE_HZ:
                return " ".join(texts), np.concatenate(pieces)

    def _another_voice(self, pcm: np.ndarray, slowest: float, fastest: float) -> np.ndarray:
        """Another tempo and pitch at once, as if another person spoke: the training speakers are few."""
        grid = np.arange(0, len(pcm) - 1, self.rng.uniform(slowest, fastest))
        other: np.ndarray = np.interp(grid, np.arange(len(pcm)), pcm).astype(np.int16)
        return other

    def _pause(self, low_s: float, high_s: float) -> np.ndarray:
        return np.zeros(int(self.rng.uniform(low_s, high_s) * SAMPLE_RATE_HZ), dtype=np.int16)

    def _context(self, text: str, language: str) -> str:
        """Now and then hotwords in the prompt, some of them spoken, so that a context does not disturb."""
        if language == "Chinese" or self.rng.random() > 0.08:
            return ""
        words = [word.strip(".,?!") for word in text.split() if len(word) > 3]
        return ", ".join(self.rng.sample(words, min(len(words), self.rng.randint(1, 4))))

    def distort(self, audio: np.ndarray) -> np.ndarray:
        """Room, band, noise and gain, each by chance: float32 `[num_samples]` in and out."""
        if self.rng.random() < 0.25 * self.distortion:
            audio = self._reverberate(audio)
        if self.rng.random() < 0.6 * self.distortion:
            audio = self._filter(audio, telephone=self.rng.random() < 0.4)
        if self.rng.random() < 0.75 * self.distortion:
            audio = self._add_noise(audio)
        peak = float(np.abs(audio).max()) + 1e-9
        return (audio * (10 ** self.rng.uniform(-1.3, -0.02) / peak)).astype(np.float32)

    def _reverberate(self, audio: np.ndarray) -> np.ndarray:
        decay_s = self.rng.uniform(0.08, 0.35)
        taps = int(decay_s * SAMPLE_RATE_HZ)
        tail = self.noise_rng.standard_normal(taps) * np.exp(-6.9 * np.arange(taps) / taps)
        tail *= self.rng.uniform(0.1, 0.4) / np.sqrt(np.sum(tail**2))
        tail[0] += 1.0
        return _convolve(audio, tail)

    def _filter(self, audio: np.ndarray, telephone: bool) -> np.ndarray:
        """A telephone band (300 to 3400 Hz), or a smooth random equalizer of +-8 dB."""
        num_fft = _fast_length(len(audio))
        spectrum = np.fft.rfft(audio, num_fft)
        hz = np.linspace(0, SAMPLE_RATE_HZ / 2, len(spectrum))
        if telephone:
            gain = 1 / (1 + (300 / np.maximum(hz, 1)) ** 8) / (1 + (hz / 3400) ** 16)
        else:
            points = [0, 300, 1000, 2500, 5000, 8000]
            gain = 10 ** (np.interp(hz, points, [self.rng.uniform(-8, 8) for _ in points]) / 20)
        return np.fft.irfft(spectrum * gain, num_fft)[: len(audio)]

    def _add_noise(self, audio: np.ndarray, quiet: bool = False) -> np.ndarray:
        """White to brown noise at 10 to 40 dB below the speech (`quiet`: at a low absolute level)."""
        num_fft = _fast_length(len(audio))
        noise = self.noise_rng.standard_normal(num_fft)
        slope = self.rng.choice((0.0, 0.5, 1.0))
        if slope:
            spectrum = np.fft.rfft(noise)
            spectrum /= np.maximum(np.arange(len(spectrum)), 20) ** slope
            noise = np.fft.irfft(spectrum, num_fft)
        noise = noise[: len(audio)] / (np.std(noise) + 1e-12)
        if quiet:
            return (noise * 10 ** self.rng.uniform(-5, -1.5)).astype(np.float32)
        level = np.sqrt(np.mean(audio**2)) * 10 ** (-self.rng.uniform(10, 40) / 20)
        noisy: np.ndarray = audio + noise * level
        return noisy


def _convolve(audio: np.ndarray, taps: np.ndarray) -> np.ndarray:
    num_fft = _fast_length(len(audio) + len(taps))
    return np.fft.irfft(np.fft.rfft(audio, num_fft) * np.fft.rfft(taps, num_fft), num_fft)[: len(audio)]


def _fast_length(length: int) -> int:
    """The next multiple of a block that FFTs of every length here are quick at."""
    return -(-length // NUM_FFT_PAD) * NUM_FFT_PAD
