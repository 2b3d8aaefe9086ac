"""The recipe of the embedded family, stage by stage: banks of speech, a tokenizer, two trained checkpoints.

Each stage leaves its result in `work` and is skipped when it is there, so an interrupted run goes on. Seeds are fixed.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from pathlib import Path

import torch
from qwen_asr.core.transformers_backend import Qwen3ASRForConditionalGeneration
from torch import nn
from transformers import Qwen2TokenizerFast

from pipeline.embedded.checkpoint_files import model_config, save_checkpoint, save_tokenizer
from pipeline.embedded.examples import Example, Examples
from pipeline.embedded.grammar import LANGUAGES
from pipeline.embedded.speech import (
    DIGITS_TEST_SPEAKER,
    Bank,
    DigitClip,
    digit_string,
    load_digits,
    sentences,
    sounds,
    speak_all,
    write_bank,
)
from pipeline.embedded.training import Collator, Plan, Trainer, train

SEED = 20_261_122
TRAIN_SENTENCES = 14_000  # a language; about 13 hours
DEV_SENTENCES = 80
VOCAB_SIZE = 2560

SIZES = {
    "teacher": dict(
        audio_d_model=192, audio_layers=6, audio_heads=4, audio_ffn=768, downsample_hidden=64,
        text_hidden=256, text_layers=5, text_heads=4, text_kv_heads=2, text_intermediate=1024,
    ),
    "student": dict(
        audio_d_model=128, audio_layers=4, audio_heads=4, audio_ffn=512, downsample_hidden=48,
        text_hidden=256, text_layers=4, text_heads=4, text_kv_heads=2, text_intermediate=640,
    ),
}  # fmt: skip
PLANS = {
    "teacher": Plan(ctc_steps=1200, single_steps=3500, mixed_steps=(3900, 7500, 10_000)),
    "student": Plan(ctc_steps=1500, single_steps=5000, mixed_steps=(5000,)),
}


def make_banks(work: Path) -> dict[str, dict[str, Bank]]:
    """subset -> language -> bank."""
    banks: dict[str, dict[str, Bank]] = {}
    for subset, count in (("dev", DEV_SENTENCES), ("train", TRAIN_SENTENCES)):
        banks[subset] = {}
        for language in LANGUAGES:
            folder = work / "banks" / subset / language
            write_bank(folder, speak_all(language, subset, count, SEED))
            banks[subset][language] = Bank(folder)
    return banks


def make_tokenizer(work: Path) -> Qwen2TokenizerFast:
    folder = work / "tokenizer"
    if folder.exists():
        tokenizer: Qwen2TokenizerFast = Qwen2TokenizerFast.from_pretrained(folder)
        return tokenizer
    texts: list[str] = ["language None<asr_text>"]
    for language in LANGUAGES:
        drawn = sentences(language, "train", 20_000, random.Random(SEED))
        # Chinese goes in character by character, so that tokens are characters and never end inside one
        texts += itertools.chain.from_iterable(drawn) if language == "Chinese" else drawn
        texts += [f"language {language}"] * 100
    return save_tokenizer(folder, texts, VOCAB_SIZE)


def digit_speakers(fsdd: Path) -> dict[str, dict[int, list[DigitClip]]]:
    """speaker -> digit -> clips."""
    speakers: dict[str, dict[int, list[DigitClip]]] = defaultdict(lambda: defaultdict(list))
    for clip in load_digits(fsdd):
        speakers[clip.speaker][clip.digit].append(clip)
    return {name: dict(clips) for name, clips in speakers.items()}


def dev_sets(banks: dict[str, Bank], digits: dict[str, dict[int, list[DigitClip]]]) -> dict[str, list[Example]]:
    """Development sets: unheard sentences in unheard voices, one by one and joined; and new strings of the training
    speakers' digits (the test speaker is not touched)."""
    draw = Examples(banks, digits, SEED)
    sets: dict[str, list[Example]] = {}
    for language, bank in banks.items():
        sets[language] = [
            Example(draw.distort(bank.pcm(i) / 32768.0), utterance.text, language)
            for i, utterance in enumerate(bank.utterances)
        ]
        joined = []
        for _ in range(12):
            text, pcm = draw.joined(bank, language, 25.0)
            joined.append(Example(draw.distort(pcm / 32768.0), text, language))
        sets[f"{language} joined"] = joined
    strings = [digit_string(clips, draw.rng, draw.rng.randint(3, 8)) for clips in digits.values() for _ in range(10)]
    sets["digits"] = [Example(draw.distort(pcm / 32768.0), text, "English") for text, pcm in strings]
    return sets


def initialize(model: Qwen3ASRForConditionalGeneration) -> None:
    """Scale weights by their fan-in. Under the published range of 0.02, made for wide layers, the three small
    convolutions shrink the audio to 1/200 of the position embedding that is added to it, and CTC never finds it."""
    for part in (model.thinker.audio_tower, model.thinker.model):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    model.thinker.audio_tower.to(memory_format=torch.channels_last)  # half the time of the convolutions


def train_checkpoint(name: str, work: Path, fsdd: Path) -> Path:
    """Train `teacher` or `student` and write it, bfloat16, to `work/<name>`."""
    torch.set_num_threads(1)  # two checkpoints train side by side faster than one after the other on two cores
    banks, tokenizer = make_banks(work), make_tokenizer(work)
    speakers = digit_speakers(fsdd)
    speakers.pop(DIGITS_TEST_SPEAKER)
    torch.manual_seed(SEED)
    model = Qwen3ASRForConditionalGeneration(model_config(tokenizer, languages=LANGUAGES, **SIZES[name]))
    heard = (sounds(each.language, each.text) for bank in banks["train"].values() for each in bank.utterances)
    characters = "".join(sorted(set().union(*heard)))
    initialize(model)
    trainer = Trainer(model, Collator(tokenizer, characters), PLANS[name], compiled=True)
    examples = Examples(banks["train"], speakers, SEED)
    train(trainer, examples, dev_sets(banks["dev"], speakers), work / f"{name}.state.pt", work / f"{name}.jsonl")
    save_checkpoint(work / name, model, tokenizer, torch.bfloat16)
    return work / name
