"""Writes small Qwen3-ASR checkpoints: the same classes and files as the published ones, at any size.

What `save_checkpoint` writes loads unchanged in `qwen_asr.Qwen3ASRModel.from_pretrained(folder)`. One thing differs
from the published vocabulary: qwen-asr's own `transcribe` always stops at ids 151645 and 151643, which a small
vocabulary does not have, so it runs to its token limit; read the end ids from generation_config.json instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from qwen_asr.core.transformers_backend import (
    Qwen3ASRConfig,
    Qwen3ASRForConditionalGeneration,
    Qwen3ASRProcessor,
)
from qwen_asr.inference.utils import SUPPORTED_LANGUAGES
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import GenerationConfig, Qwen2TokenizerFast, WhisperFeatureExtractor

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
AUDIO_START = "<|audio_start|>"
AUDIO_END = "<|audio_end|>"
AUDIO_PAD = "<|audio_pad|>"
ASR_TEXT = "<asr_text>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", END_OF_TURN, AUDIO_START, AUDIO_END, AUDIO_PAD)
NUM_BYTE_TOKENS = 256

# Of transformers' Qwen2 tokenizer (convert_slow_tokenizer.Qwen2Converter).
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# Renders the prompt of Qwen3-ASR: a system turn with the context, a user turn with one audio, the assistant's start.
CHAT_TEMPLATE = """\
{%- set turn = namespace(context='', audios=0) -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- if message.content is string -%}
{%- set turn.context = message.content -%}
{%- else -%}
{%- for part in message.content if part.type == 'text' -%}
{%- set turn.context = turn.context + part.text -%}
{%- endfor -%}
{%- endif -%}
{%- elif message.content is not string -%}
{%- for part in message.content if part.type == 'audio' -%}
{%- set turn.audios = turn.audios + 1 -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{{- '<|im_start|>system\\n' + turn.context + '<|im_end|>\\n<|im_start|>user\\n' -}}
{%- for _ in range(turn.audios) -%}
{{- '<|audio_start|><|audio_pad|><|audio_end|>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def save_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> Qwen2TokenizerFast:
    """Trains a byte-level BPE on `texts` and writes it as a Qwen2 tokenizer into `folder`.

    `vocab_size` counts every token: 256 bytes, the merges, six special tokens and `<asr_text>`, which is no special
    token, as in the published one: it must survive `skip_special_tokens`. Fewer tokens come out when `texts` run out of
    merges. A frequent Chinese character becomes one token; training looks at words (runs of letters), so characters
    that should stay whole need to occur next to different neighbours.

    Raises ValueError when `vocab_size` leaves no room for bytes and special tokens.
    """
    num_added = len(SPECIAL_TOKENS) + 1
    if vocab_size < NUM_BYTE_TOKENS + num_added:
        raise ValueError(f"vocab_size is {vocab_size}; bytes and special tokens take {NUM_BYTE_TOKENS + num_added}")
    bpe = Tokenizer(BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - num_added,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    bpe.add_tokens([AddedToken(ASR_TEXT, special=False, normalized=False)])
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=bpe,
        unk_token=None,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        model_max_length=131_072,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={
            "audio_token": AUDIO_PAD,
            "audio_bos_token": AUDIO_START,
            "audio_eos_token": AUDIO_END,
        },
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def model_config(
    tokenizer: Qwen2TokenizerFast,
    *,
    audio_d_model: int = 128,
    audio_layers: int = 4,
    audio_heads: int = 4,
    audio_ffn: int = 512,
    downsample_hidden: int = 64,
    text_hidden: int = 256,
    text_layers: int = 4,
    text_heads: int = 4,
    text_kv_heads: int = 2,
    text_intermediate: int = 768,
    languages: Sequence[str] = SUPPORTED_LANGUAGES,
) -> Qwen3ASRConfig:
    """The config of a model for `tokenizer`. All that is not an argument stands as in the published checkpoints, except
    head_dim (64, not 128) with its mrope sections, which halve too. The embedding is padded to a multiple of 64 rows.
    """
    vocabulary = tokenizer.get_vocab()
    return Qwen3ASRConfig(
        thinker_config={
            "audio_token_id": vocabulary[AUDIO_PAD],
            "audio_start_token_id": vocabulary[AUDIO_START],
            "audio_end_token_id": vocabulary[AUDIO_END],
            "tie_word_embeddings": True,
            "audio_config": {
                "num_mel_bins": 128,
                "d_model": audio_d_model,
                "encoder_layers": audio_layers,
                "encoder_attention_heads": audio_heads,
                "encoder_ffn_dim": audio_ffn,
                "downsample_hidden_size": downsample_hidden,
                "output_dim": text_hidden,
                "max_source_positions": 1500,
                "n_window": 50,
                "n_window_infer": 800,
                "conv_chunksize": 500,
            },
            "text_config": {
                "vocab_size": -(-len(tokenizer) // 64) * 64,
                "hidden_size": text_hidden,
                "intermediate_size": text_intermediate,
                "num_hidden_layers": text_layers,
                "num_attention_heads": text_heads,
                "num_key_value_heads": text_kv_heads,
                "head_dim": 64,
                "max_position_embeddings": 65_536,
                "rope_theta": 1_000_000,
                "rope_scaling": {
                    "rope_type": "default",
                    "mrope_section": [12, 10, 10],
                    "interleaved": True,
                    "mrope_interleaved": True,
                },
                "tie_word_embeddings": True,
                "eos_token_id": vocabulary[END_OF_TURN],
                "pad_token_id": vocabulary[END_OF_TEXT],
            },
        },
        support_languages=list(languages),
        tie_word_embeddings=True,
    )


def save_checkpoint(
    folder: Path, model: Qwen3ASRForConditionalGeneration, tokenizer: Qwen2TokenizerFast, dtype: torch.dtype
) -> None:
    """Writes weights (as `dtype`), configs, tokenizer and feature extractor into `folder`. `model` stays as it is."""
    vocabulary = tokenizer.get_vocab()
    end_of_turn, end_of_text = vocabulary[END_OF_TURN], vocabulary[END_OF_TEXT]
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    del state["thinker.lm_head.weight"]  # tied to the embedding; a cast copy would be stored a second time
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    (Path(folder) / "model.safetensors").chmod(0o644)  # safetensors makes it 0600, which a wheel would carry along
    GenerationConfig(eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text).save_pretrained(folder)
    Qwen3ASRProcessor(
        feature_extractor=WhisperFeatureExtractor(feature_size=128, return_attention_mask=True),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    # save_pretrained writes the dtype of `model`, not of the weights that it is given.
    config["dtype"] = config["thinker_config"]["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")
