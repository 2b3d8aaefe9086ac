"""Operations counted on forwards, against counts by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.engine.causal.commit import CommitPolicy
from pipeline.engine.causal.roll import RollPolicy
from pipeline.engine.causal.settings import Settings
from pipeline.engine.causal.tower import Geometry
from pipeline.engine.cpu_attention import attend
from pipeline.engine.flops import FlopMeter
from pipeline.engine.model import LoadedModel
from pipeline.evaluate.streaming_systems import CausalSystem
from tests.engine.causal.streams import loaded_from
from tests.engine.tiny import noise


def test_attention_of_a_decode_step_is_counted_by_what_each_row_has_filled() -> None:
    queries, cache = torch.randn(2, 3, 2, 8), torch.randn(4, 3, 32, 8)
    positions, slots = torch.tensor([4, 9]), torch.tensor([3, 1])
    want = attend(queries, cache, cache, positions, slots)
    with (meter := FlopMeter(nn.Linear(1, 1))), torch.inference_mode():
        got = attend(queries, cache, cache, positions, slots)
    assert torch.equal(got, want)
    assert meter.total == 4 * (5 + 10) * 3 * 2 * 8 and meter.lm_head == 0


def test_attention_convolutions_and_the_output_layer_are_counted() -> None:
    head = nn.Linear(16, 50, bias=False)
    with (meter := FlopMeter(head)), torch.inference_mode():
        q = torch.randn(1, 2, 5, 8)
        nn.functional.scaled_dot_product_attention(q, q, q)
        head(torch.randn(3, 16))
        nn.functional.linear(torch.randn(7, 16), torch.randn(4, 16), torch.randn(4))
    attention, output, other = 2 * (2 * 2 * 5 * 5 * 8), 2 * 3 * 16 * 50, 2 * 7 * 16 * 4
    assert (meter.total, meter.lm_head) == (attention + output + other, output)
    if torch.backends.mkldnn.is_available():
        convolution = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        x = torch.randn(1, 2, 8, 6).contiguous(memory_format=torch.channels_last)
        arguments = convolution.padding, convolution.stride, convolution.dilation, 1, "gelu", [], "none"
        with (meter := FlopMeter(head)), torch.inference_mode():
            y = torch.ops.mkldnn._convolution_pointwise(x, convolution.weight, convolution.bias, *arguments)
        assert meter.total == 2 * y.numel() * 2 * 3 * 3
    before = meter.total
    with meter, torch.inference_mode():
        head(torch.randn(1, 16))
    assert meter.total == before + 2 * 16 * 50, "a meter goes on where it was"


SETTINGS = Settings(Geometry(96, 40), CommitPolicy(2), RollPolicy(2.0, 4.0), max_new_tokens=24, slots=1)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return loaded_from(tiny_checkpoint)


def test_operations_of_a_block_are_those_of_its_layers(loaded: LoadedModel) -> None:
    """By hand, for the first block of a stream: the tower on 12 steps, the text layers on the prompt and on each token
    that is decoded after it."""
    config = loaded.model.thinker.config
    audio, text = config.audio_config, config.text_config
    system = CausalSystem("ours", loaded, SETTINGS, loaded.info)
    system.begin("English")
    block, pcm = 96 * 160 + 200, noise(2.0)
    with (meter := FlopMeter(system.lm_head)):
        (update,) = system.hear(pcm[: block + 100])
    (stream,) = system._batch._streams.values()
    steps, d = 12, audio.d_model
    tower = audio.encoder_layers * (2 * steps * (4 * d * d + 2 * d * audio.encoder_ffn_dim) + 4 * steps * steps * d)
    tower += 2 * steps * (d * d + d * audio.output_dim)
    channels, mels = audio.downsample_hidden_size, audio.num_mel_bins
    at = [(8, mels, 1), (4, mels // 2, channels), (2, mels // 4, channels), (1, mels // 8, channels)]
    for (frames, _, inputs), (halves, half_mels, outputs) in zip(at, at[1:], strict=False):
        tower += 2 * steps * half_mels * (3 * frames * inputs) * (halves * outputs)
    tower += 2 * steps * (channels * mels // 8) * d
    hidden, head_dim = text.hidden_size, text.head_dim
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    qkv, out = hidden * (heads + 2 * kv_heads) * head_dim, heads * head_dim * hidden
    mlp, output = 3 * hidden * text.intermediate_size, hidden * text.vocab_size
    prompt = len(stream.prompt.head) + steps + len(stream.prompt.tail)
    said = len(stream.segment.token_ids)
    rounded, layers = -(-prompt // 64) * 64, text.num_hidden_layers
    prefill = layers * 2 * prompt * qkv + (layers - 1) * 2 * prompt * (out + mlp) + 2 * (out + mlp)
    prefill += 4 * rounded * heads * head_dim * ((layers - 1) * prompt + 1)
    steps_of_decoding = range(prompt, prompt + said - 1)
    decode = sum(layers * (2 * (qkv + out + mlp) + 4 * (at + 1) * heads * head_dim) for at in steps_of_decoding)
    assert meter.lm_head == 2 * said * output
    mel = meter.total - tower - prefill - decode - meter.lm_head
    frames = 96
    assert mel == 2 * frames * 201 * mels, "the filters of the log-mel; its Fourier transform is not counted"
