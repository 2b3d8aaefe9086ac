"""Examples as Qwen3-ASR's own forward takes them, the transcript teacher-forced behind the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.distill.audio import Example
from pipeline.engine.features import ClipMel
from pipeline.engine.model import padded
from pipeline.engine.windowed import num_audio_tokens

NO_LOSS = -100  # what cross_entropy passes over
_AFTER_LANGUAGE = "<asr_text>"


def collate(
    examples: Sequence[Example], processor: Any, dtype: torch.dtype = torch.float32, as_written: bool = False
) -> dict[str, Tensor]:
    """A batch, padded on the right; `processor` is the checkpoint's Qwen3ASRProcessor, `dtype` the model's.

    input_ids, attention_mask, labels int64 [B, L]; input_features [B, mels, T] in `dtype`; feature_attention_mask int64
    [B, T]. What follows the prompt is `language X<asr_text>...` and the end token, as the model writes it when no
    language is forced. labels are input_ids there and NO_LOSS elsewhere; as transformers has it they are not shifted:
    logits at i tell of labels at i + 1. `as_written`: the tokens that a teacher with this tokenizer wrote, where an
    example has them; a language that was forced stands in the prompt then.
    """
    head, tail, audio_token = prompt(processor)
    tokenizer = processor.tokenizer
    mel, num_frames = _mel(processor.feature_extractor.feature_size).log_mel([padded(each.pcm) for each in examples])
    ids, labels = [], []
    for each, num_tokens in zip(examples, num_audio_tokens(num_frames).tolist(), strict=True):
        ids_before = [*head, *[audio_token] * num_tokens, *tail]
        answer = answer_ids(tokenizer, each.ref.language, each.ref.text)
        if as_written and each.ref.token_ids:
            answer = list(each.ref.token_ids)
            if _AFTER_LANGUAGE not in tokenizer.decode(answer):
                ids_before += tokenizer.encode(
                    f"language {each.ref.language}{_AFTER_LANGUAGE}", add_special_tokens=False
                )
        ids.append(torch.tensor(ids_before + answer))
        labels.append(torch.tensor([NO_LOSS] * len(ids_before) + answer))
    inside = torch.arange(mel.shape[2]) < num_frames[:, None]
    return {
        "input_ids": pad_sequence(ids, True, tokenizer.pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
        "input_features": mel.to(dtype),
        "feature_attention_mask": inside.to(torch.int64),
        "labels": pad_sequence(labels, True, NO_LOSS),
    }


def answer_ids(tokenizer: Any, language: str, text: str) -> list[int]:
    """The tokens of what Qwen3-ASR writes about speech in `language` (a name), the end token last."""
    ids: list[int] = tokenizer.encode(f"language {language}{_AFTER_LANGUAGE}{text}", add_special_tokens=False)
    return [*ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def prompt(processor: Any) -> tuple[list[int], list[int], int]:
    """The prompt's tokens before and after the audio, without a context, and the token that stands for audio."""
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": [{"type": "audio", "audio": ""}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = processor.tokenizer(text)["input_ids"]
    audio_token = processor.tokenizer.convert_tokens_to_ids(processor.audio_token)
    at = ids.index(audio_token)
    return ids[:at], ids[at + 1 :], audio_token


@cache
def _mel(num_mels: int) -> ClipMel:
    return ClipMel(num_mels, torch.device("cpu"))
