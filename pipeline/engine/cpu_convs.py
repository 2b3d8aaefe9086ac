"""The audio tower's convolutions on a CPU: oneDNN's kernel with the activation in it, on channels that lie together, as
PyTorch's own compiler calls it. Half the time of a convolution and a GELU of their own, in float32 a third."""

from __future__ import annotations

from functools import partial

import torch
from qwen_asr.core.transformers_backend.modeling_qwen3_asr import Qwen3ASRAudioEncoder
from torch import Tensor, nn

from pipeline.engine.windowed import Conv, convs_of

_DTYPES = (torch.float32, torch.bfloat16)


def fused_convs(tower: Qwen3ASRAudioEncoder) -> list[Conv]:
    """See windowed.encode. Torch's own where oneDNN, or a CPU, is not."""
    weight = tower.conv2d1.weight
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return convs_of(tower)
    return [
        # not laid out beforehand: what suits one number of chunks costs 50 times as much with another
        partial(_conv, conv, conv.weight.detach().contiguous(memory_format=torch.channels_last))
        for conv in (tower.conv2d1, tower.conv2d2, tower.conv2d3)
    ]


def _conv(conv: nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    activated: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups, "gelu", [], "none"
    )
    return activated
