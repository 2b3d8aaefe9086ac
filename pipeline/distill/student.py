"""The student as it is written: a twin on the CPU, with what its fake quantization makes of the weights that learn.

Rounded weights lie on their grid: neither bfloat16 nor another rounding moves them off, so that what is written says
what was trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.distill.quantize import load
from pipeline.distill.quantized_output import write_fake_quant
from pipeline.engine.checkpoint import Checkpoint


class Student:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._source = checkpoint.path
        self.wrapper: Any = load(checkpoint, torch.device("cpu"))

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """A checkpoint in `folder` with these `weights` (names from `thinker` on), there whole or not at all."""
        for name, weight in weights.items():
            linear = self.wrapper.model.get_submodule(name.removesuffix(".weight"))
            linear.get_parameter("weight").copy_(linear.weight_quantizer(weight))
        partial = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_fake_quant(self.wrapper.model, self._source, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
