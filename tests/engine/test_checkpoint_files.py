from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qwen_asr import Qwen3ASRModel
from safetensors.torch import load_file

from pipeline.embedded.checkpoint_files import ASR_TEXT, SPECIAL_TOKENS, model_config, save_checkpoint, save_tokenizer
from tests.engine.tiny import noise


def test_what_is_saved_loads_in_qwen_asr_unchanged(tiny_checkpoint: Path) -> None:
    wrapper = Qwen3ASRModel.from_pretrained(str(tiny_checkpoint), max_new_tokens=4)
    stored = load_file(tiny_checkpoint / "model.safetensors")
    loaded = wrapper.model.state_dict()
    assert set(loaded) - set(stored) == {"thinker.lm_head.weight"}  # tied
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
    assert wrapper._build_text_prompt("the context", "English") == (
        "<|im_start|>system\nthe context<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|>"
        "<|im_end|>\n<|im_start|>assistant\nlanguage English<asr_text>"
    )
    assert wrapper.transcribe((noise(2) / 32768, 16_000))[0].text


def test_weights_are_cast_and_the_tied_head_is_stored_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    wrapper = Qwen3ASRModel.from_pretrained(str(tiny_checkpoint))
    save_checkpoint(tmp_path, wrapper.model, wrapper.processor.tokenizer, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(load_file(tiny_checkpoint / "model.safetensors"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert wrapper.model.dtype == torch.float32
    assert Qwen3ASRModel.from_pretrained(str(tmp_path), dtype="auto").model.dtype == torch.bfloat16


def test_tokenizer_keeps_its_words_and_its_tokens(tmp_path: Path) -> None:
    texts = ["don't 你好 你们 我们 好人"] * 3
    tokenizer = save_tokenizer(tmp_path, texts, 400)
    assert tokenizer.tokenize("don't") == ["don", "'t"]
    for character in "你好们":
        assert len(tokenizer(character)["input_ids"]) == 1
    text = "language English<asr_text>don't 你好, any byte: ü\n"
    ids = tokenizer(text + "<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert all(len(tokenizer(token)["input_ids"]) == 1 for token in (*SPECIAL_TOKENS, ASR_TEXT))


def test_embedding_is_padded_to_a_multiple_of_64(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, ["abc abd"] * 3, 300)
    config = model_config(tokenizer)
    assert len(tokenizer) < 300
    assert config.thinker_config.text_config.vocab_size == 320


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is 262; bytes and special tokens take 263"):
        save_tokenizer(tmp_path, ["a"], 262)
