"""Trains one checkpoint of the embedded family.

Cross-entropy alone takes thousands of steps to find the audio; throw-away CTC heads find it in hundreds. One sits on
the tower, one on the decoder's lower layers at the audio positions: the tower numbers its tokens anew every second, so
only the decoder knows their order beyond that. Tower and lower layers first learn with CTC alone, then everything with
cross-entropy and CTC together. Muon trains the matrices: it brought CTC in 700 steps where AdamW was after 1,100.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from qwen_asr.core.transformers_backend import Qwen3ASRForConditionalGeneration
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedTokenizerBase

from pipeline.embedded.examples import Example, Examples
from pipeline.embedded.speech import sounds
from pipeline.engine.mel import HOP, LogMel
from pipeline.engine.windowed import encode, num_audio_tokens, transformer

LOG_EVERY = 50  # steps
CTC_RATE = 3  # characters that one audio token (77 ms) may stand for: English has up to 20 a second, and blanks between


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast. Three stages, each easier than what it prepares for:

    - `ctc_steps`: the tower and the decoder's lower half with CTC; single sentences, first clean, then ever more
      distorted
    - `single_steps`: everything; single sentences, a little distorted, in small batches, because the decoder needs
      many steps rather than much audio until it listens
    - `mixed_steps`: everything, joined to windows of up to 30 s, fully distorted; the learning rate falls to its lowest
      at the first of these steps of the stage, rises and falls again to the next. The mean of the weights at these
      steps is what comes out: three of the teacher's have 3.5 to 3.9 % errors each, their mean 1.8
    """

    ctc_steps: int
    single_steps: int
    mixed_steps: tuple[int, ...]
    learning_rate: float = 1.5e-3  # AdamW's: embeddings, convolutions, norms, biases
    muon_learning_rate: float = 0.02  # of the matrices of all layers
    batch_audio_s: float = 45.0
    single_batch_audio_s: float = 32.0
    single_distortion: float = 0.4
    warmup_steps: int = 200
    ctc_weight: float = 0.3  # of either CTC loss beside cross-entropy
    max_grad_norm: float = 1.0
    save_every: int = 250

    @property
    def mixed_from(self) -> int:
        return self.ctc_steps + self.single_steps

    @property
    def steps(self) -> int:
        return self.mixed_from + self.mixed_steps[-1]

    @property
    def minima(self) -> list[int]:
        """Steps after which the learning rate is at its lowest."""
        return [self.mixed_from + step for step in self.mixed_steps]


@dataclass(frozen=True, slots=True)
class Batch:
    """audio float32 [B, N]; num_frames int64 [B]; input_ids int64 [B, L] with audio_pad where audio goes, right-padded;
    targets int64 [B, L], -100 where there is no loss; ctc int64 [B, S] with ctc_lengths."""

    audio: Tensor
    num_frames: Tensor
    input_ids: Tensor
    targets: Tensor
    ctc: Tensor
    ctc_lengths: Tensor


class Collator:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, characters: str) -> None:
        """`characters`: what the CTC head writes, all that occur in the `sounds` of the training texts."""
        self.tokenizer = tokenizer
        self.characters = {character: index for index, character in enumerate(characters)}
        self.audio_pad = tokenizer.convert_tokens_to_ids("<|audio_pad|>")
        self.pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def prompt(self, context: str, num_tokens: int) -> list[int]:
        """Ids of Qwen3-ASR's prompt with `num_tokens` audio places."""
        before = f"<|im_start|>system\n{context}<|im_end|>\n<|im_start|>user\n<|audio_start|>"
        after = "<|audio_end|><|im_end|>\n<|im_start|>assistant\n"
        ids: list[int] = self.tokenizer.encode(before) + [self.audio_pad] * num_tokens + self.tokenizer.encode(after)
        return ids

    def __call__(self, examples: list[Example]) -> Batch:
        lengths = torch.tensor([len(example.audio) // HOP for example in examples])
        audio = np.zeros((len(examples), int(lengths.max()) * HOP), dtype=np.float32)
        ids, targets, ctc = [], [], []
        for row, (example, frames) in enumerate(zip(examples, lengths.tolist(), strict=True)):
            audio[row, : frames * HOP] = example.audio[: frames * HOP]
            prompt = self.prompt(example.context, int(num_audio_tokens(torch.tensor(frames))))
            answer = self.tokenizer.encode(f"language {example.language}<asr_text>{example.text}<|im_end|>")
            ids.append(torch.tensor(prompt + answer))
            targets.append(torch.tensor([-100] * (len(prompt) - 1) + answer + [-100]))
            ctc.append(
                torch.tensor([self.characters[c] for c in sounds(example.language, example.text)], dtype=torch.int64)
            )
        return Batch(
            torch.from_numpy(audio),
            lengths,
            nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad),
            nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100),
            nn.utils.rnn.pad_sequence(ctc, batch_first=True),
            torch.tensor([len(row) for row in ctc]),
        )


def prefetched(examples: Examples, trainer: Trainer, depth: int = 4) -> Iterator[Batch]:
    """The batches of the steps that are left, made ahead by one thread in a fixed order."""
    plan = trainer.plan
    ready: queue.Queue[Batch] = queue.Queue(depth)
    steps = range(trainer.step_number, plan.steps)

    def make() -> None:
        for step in steps:
            if step < plan.ctc_steps:
                batch = examples.batch(plan.batch_audio_s, joined=False, distortion=step / plan.ctc_steps)
            elif step < plan.mixed_from:
                batch = examples.batch(plan.single_batch_audio_s, joined=False, distortion=plan.single_distortion)
            else:
                batch = examples.batch(plan.batch_audio_s)
            ready.put(trainer.collate(batch))

    threading.Thread(target=make, daemon=True).start()
    for _ in steps:
        yield ready.get()


def spec_augment(mel: Tensor, rng: torch.Generator) -> Tensor:
    """Blank a band of up to 20 mels and a stretch of up to 0.2 s of every 4 s, the same rows for the whole batch."""
    mel = mel.clone()
    height = int(torch.randint(0, 21, (1,), generator=rng))
    top = int(torch.randint(0, mel.shape[1] - height, (1,), generator=rng))
    mel[:, top : top + height] = 0.0
    for start in range(0, mel.shape[2] - 20, 400):
        width = int(torch.randint(0, 21, (1,), generator=rng))
        left = start + int(torch.randint(0, 380, (1,), generator=rng))
        mel[:, :, left : left + width] = 0.0
    return mel


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean losses: cross-entropy a token (0 while CTC learns alone), CTC a character on the tower and on the decoder's
    lower layers."""

    ce: Tensor
    tower_ctc: Tensor
    decoder_ctc: Tensor


class Trainer:
    """Model, CTC heads, optimizers and their step; saved whole, so that a run goes on after an interruption."""

    def __init__(
        self, model: Qwen3ASRForConditionalGeneration, collate: Collator, plan: Plan, compiled: bool = False
    ) -> None:
        """`compiled` steps take three quarters of the time, after a minute of compiling (needs a C++ compiler)."""
        self.model, self.collate, self.plan = model, collate, plan
        self.mel = LogMel()
        thinker = model.thinker
        self.layers = list(thinker.model.layers)
        self.num_lower = len(self.layers) // 2
        self.transformer = transformer
        if compiled:
            self.layers = [torch.compile(layer, dynamic=True) for layer in self.layers]
            self.transformer = torch.compile(transformer, dynamic=True)
        hidden = model.config.thinker_config.audio_config.output_dim
        self.blank = len(collate.characters)
        self.tower_head = nn.Linear(hidden, CTC_RATE * (self.blank + 1))
        self.decoder_head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, CTC_RATE * (self.blank + 1)))
        of_layers = [*thinker.audio_tower.layers.parameters(), *thinker.model.layers.parameters()]
        matrices = [p for p in of_layers if p.ndim == 2]
        known = set(matrices)
        rest = [p for m in (model, self.tower_head, self.decoder_head) for p in m.parameters() if p not in known]
        self.parameters = matrices + rest
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=plan.muon_learning_rate, weight_decay=0.05),
            torch.optim.AdamW(rest, lr=plan.learning_rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True),
        )
        self.step_number = 0
        self.mean: dict[str, Tensor] = {}  # of the weights at `num_minima` steps
        self.num_minima = 0
        self.rng = torch.Generator().manual_seed(0)

    def schedule(self, step: int) -> float:
        """Factor of the learning rates: warm-up at the start of CTC and of joint training; cosine to 2 % from the first
        mixed step to each minimum."""
        plan = self.plan
        since = step if step < plan.ctc_steps else step - plan.ctc_steps
        warm = min(1.0, (since + 1) / plan.warmup_steps)
        minimum = next((each for each in plan.minima if step < each), plan.steps)
        fall = max(0.0, (step - plan.mixed_from) / (minimum - plan.mixed_from))
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fall)))

    def losses(self, batch: Batch) -> Losses:
        thinker = self.model.thinker
        mel = self.features(batch)
        if self.step_number >= self.plan.mixed_from:
            mel = spec_augment(mel, self.rng)
        embeds, num_tokens = encode(thinker.audio_tower, mel, batch.num_frames, self.transformer)
        ids, joint = batch.input_ids, self.step_number >= self.plan.ctc_steps
        first = (ids == self.collate.audio_pad).int().argmax(1)
        if not joint:
            ids = ids[:, : int((first + num_tokens).max())]
        hidden = self.merge(ids, embeds, num_tokens)
        positions = torch.arange(ids.shape[1]).expand(3, len(ids), -1)
        rotary = thinker.model.rotary_emb(hidden, positions)
        for layer in self.layers[: self.num_lower]:
            hidden = layer(hidden, position_embeddings=rotary)
        places = (first[:, None] + torch.arange(embeds.shape[1])).clamp(max=ids.shape[1] - 1)
        heard = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[2]))
        tower_ctc = self.ctc(self.tower_head(embeds), num_tokens, batch)
        decoder_ctc = self.ctc(self.decoder_head(heard), num_tokens, batch)
        if not joint:
            return Losses(torch.zeros(()), tower_ctc, decoder_ctc)
        for layer in self.layers[self.num_lower :]:
            hidden = layer(hidden, position_embeddings=rotary)
        wanted = batch.targets != -100
        logits = thinker.lm_head(thinker.model.norm(hidden[wanted]))
        return Losses(F.cross_entropy(logits.float(), batch.targets[wanted]), tower_ctc, decoder_ctc)

    def ctc(self, logits: Tensor, num_tokens: Tensor, batch: Batch) -> Tensor:
        """CTC a character; logits [B, L, CTC_RATE * (characters + 1)]."""
        log_probs = logits.unflatten(-1, (CTC_RATE, -1)).flatten(1, 2).float().log_softmax(-1).transpose(0, 1)
        loss = F.ctc_loss(
            log_probs, batch.ctc, CTC_RATE * num_tokens, batch.ctc_lengths, self.blank, "sum", zero_infinity=True
        )
        return loss / batch.ctc_lengths.sum().clamp(min=1)

    def features(self, batch: Batch) -> Tensor:
        """Log-mel [B, 128, T], zero after a clip's end as qwen-asr pads it (silence would be about -1)."""
        mel: Tensor = self.mel(batch.audio)
        return mel * (torch.arange(mel.shape[2]) < batch.num_frames[:, None, None])

    def merge(self, input_ids: Tensor, embeds: Tensor, num_tokens: Tensor) -> Tensor:
        """Token embeddings [B, L, d] with the audio embeddings in the audio places."""
        text: Tensor = self.model.thinker.model.embed_tokens(input_ids)
        valid = torch.arange(embeds.shape[1]) < num_tokens[:, None]
        places = (input_ids == self.collate.audio_pad).unsqueeze(-1).expand_as(text)
        return text.masked_scatter(places, embeds[valid].to(text.dtype))

    def step(self, batch: Batch) -> tuple[float, float, float]:
        factor = self.schedule(self.step_number)
        rates = (self.plan.muon_learning_rate, self.plan.learning_rate)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        # the plain kernel: on CPU the flash kernel's backward takes 1.6 times as long at these lengths
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            losses = self.losses(batch)
        joint = self.step_number >= self.plan.ctc_steps
        weight = self.plan.ctc_weight if joint else 1.0
        (losses.ce + weight * (losses.tower_ctc + losses.decoder_ctc)).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.plan.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        return losses.ce.item(), losses.tower_ctc.item(), losses.decoder_ctc.item()

    @torch.no_grad()
    def transcribe(self, examples: list[Example], max_new_tokens: int = 160) -> list[str]:
        """Greedy answers of a batch of examples, "language X<asr_text>..." as decoded."""
        thinker, tokenizer = self.model.thinker, self.collate.tokenizer
        batch = self.collate(examples)
        embeds, num_tokens = encode(thinker.audio_tower, self.features(batch), batch.num_frames)
        prompts = [self.collate.prompt("", int(n)) for n in num_tokens]
        width = max(map(len, prompts))
        ids = torch.tensor([[self.collate.pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        inputs, cache = self.merge(ids, embeds, num_tokens), DynamicCache()
        eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
        answers: list[list[int]] = [[] for _ in examples]
        alive = torch.ones(len(examples), dtype=torch.bool)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for _ in range(max_new_tokens):
            out = thinker.model(
                inputs_embeds=inputs,
                attention_mask=mask,
                position_ids=positions[:, -inputs.shape[1] :],
                past_key_values=cache,
            )
            token = thinker.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
            alive &= token != eos
            if not alive.any():
                break
            for row in alive.nonzero().flatten().tolist():
                answers[row].append(int(token[row]))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            inputs = thinker.model.embed_tokens(token[:, None])
        return tokenizer.batch_decode(answers)

    def add_to_mean(self) -> None:
        """Let the weights as they are count in the mean."""
        self.num_minima += 1
        for name, weight in self.model.state_dict().items():
            seen = self.mean.get(name, torch.zeros_like(weight))
            self.mean[name] = seen + (weight - seen) / self.num_minima

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "heads": [self.tower_head.state_dict(), self.decoder_head.state_dict()],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step_number,
            "mean": self.mean,
            "num_minima": self.num_minima,
            "rng": self.rng.get_state(),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for head, saved in zip((self.tower_head, self.decoder_head), state["heads"], strict=True):
            head.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step_number = state["step"]
        self.mean, self.num_minima = state["mean"], state["num_minima"]
        self.rng.set_state(state["rng"])


def train(trainer: Trainer, examples: Examples, dev: dict[str, list[Example]], state: Path, log: Path) -> None:
    """Run the plan to its end, from `state` when there is one; one JSON line per `LOG_EVERY` steps in `log`.

    The model ends with the mean of its weights at the minima of the learning rate.
    """
    plan = trainer.plan
    if state.exists():
        trainer.restore(state)
        examples.rng.seed(trainer.step_number)  # new examples, not those already seen
    began = time.monotonic()
    sums: list[tuple[float, float, float]] = []
    for batch in prefetched(examples, trainer):
        sums.append(trainer.step(batch))
        step = trainer.step_number
        if step % LOG_EVERY == 0:
            ce, tower_ctc, decoder_ctc = (sum(column) / len(sums) for column in zip(*sums, strict=True))
            seconds = (time.monotonic() - began) / len(sums)
            line: dict[str, object] = {
                "step": step,
                "ce": round(ce, 4),
                "tower_ctc": round(tower_ctc, 4),
                "decoder_ctc": round(decoder_ctc, 4),
                "s_per_step": round(seconds, 3),
            }
            if step % 1000 == 0 and step > plan.ctc_steps:
                line["dev_error"] = dev_error(trainer, dev)
            with log.open("a") as out:
                out.write(json.dumps(line) + "\n")
            sums.clear()
            began = time.monotonic()
        if step in plan.minima:
            trainer.add_to_mean()
        if step % plan.save_every == 0 or step == plan.steps:
            trainer.save(state)
    trainer.model.load_state_dict(trainer.mean)


def dev_error(trainer: Trainer, dev: dict[str, list[Example]]) -> dict[str, float]:
    """Word error rate (character error rate for Chinese) in percent of each held-out development set."""
    from pipeline.metrics import ErrorCounts, error_counts

    trainer.model.eval()
    errors = {}
    for name, examples in dev.items():
        counts = ErrorCounts(0, 0, 0, 0)
        for start in range(0, len(examples), 32):
            some = examples[start : start + 32]
            for example, answer in zip(some, trainer.transcribe(some), strict=True):
                counts += error_counts(example.text, answer.partition("<asr_text>")[2], example.language)
        errors[name] = round(100 * counts.rate, 2)
    trainer.model.train()
    return errors
