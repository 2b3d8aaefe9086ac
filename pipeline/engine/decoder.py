"""Greedy decoding over a fixed number of slots: a row a segment, each at its own position in a preallocated cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from qwen_asr.core.transformers_backend.modeling_qwen3_asr import Qwen3ASRThinkerForConditionalGeneration
from torch import Tensor

from pipeline.engine.cpu_kernels import DTYPES, best
from pipeline.engine.cpu_layers import CpuTextLayers
from pipeline.engine.graphs import Graph
from pipeline.engine.int4 import Int4Weight
from pipeline.engine.layers import TextLayers

_ROW_STEP = 8  # slots of a step are a multiple of it
_GRAPH_LENGTH_STEP = 256
_WIDTH_STEP = 64  # positions: attention reads the cache up to a multiple of it, which keeps its shapes few


class Choice(NamedTuple):
    """What greedy decoding chose for some rows: token ids int64 [B], their log-probabilities float32 [B] (NaN where
    logits are), and the top-k log-probabilities float32 [B, k] with their ids int64 [B, k], k 0 when not asked for."""

    tokens: Tensor
    logprobs: Tensor
    top_logprobs: Tensor
    top_ids: Tensor


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt that has no slot yet: its keys and values [kv_heads, T, head_dim] a layer, and the first token's choice
    (of one row)."""

    keys: list[Tensor]
    values: list[Tensor]
    choice: Choice


class Fetch:
    """A choice on its way to the host: on CUDA the copy is queued behind the step that made it, and nobody waits for it
    before `read`."""

    def __init__(self, choice: Choice) -> None:
        self._event: torch.cuda.Event | None = None
        self._choice = choice
        if choice.tokens.is_cuda:
            self._choice = Choice(*(_on_its_way(each) for each in choice))
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Choice:
        """On the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._choice


def _on_its_way(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class SlotDecoder:
    """Greedy decoding for `num_slots` rows of at most `width` positions each.

    `prefill` starts rows in free slots, `step` moves the first slots one token on; a slot whose row has ended goes on
    with nonsense until it is filled anew. Nothing here waits for the device.
    """

    def __init__(
        self,
        thinker: Qwen3ASRThinkerForConditionalGeneration,
        num_slots: int,
        width: int,
        int4: Mapping[str, Int4Weight] | None = None,
        num_top: int = 0,
    ) -> None:
        """`int4` holds the weights of quantized layers by name, from `thinker.` on."""
        text: Any = thinker.model
        self.num_top = num_top
        self._embed, self._lm_head = text.embed_tokens, thinker.lm_head
        weight = self._embed.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._has_kernels = self._device.type == "cpu" and self._dtype in DTYPES
        self._text = (CpuTextLayers if self._has_kernels else TextLayers)(thinker, int4 or {})
        self.int4_switch = self._text.int4_switch
        self.num_slots = self.width = 0
        self._tokens = self._positions = torch.empty(0, dtype=torch.int64)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self.resize(num_slots, width)

    @staticmethod
    def bytes_per_position(thinker: Qwen3ASRThinkerForConditionalGeneration) -> int:
        """Cache bytes of one position of one slot."""
        config, weight = thinker.model.config, thinker.model.embed_tokens.weight
        head_dim = thinker.model.layers[0].self_attn.head_dim
        return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * weight.element_size())

    def resize(self, num_slots: int, width: int, keep: Sequence[int] = ()) -> None:
        """Another number of slots or width; the rows of slots `keep` are in the first slots afterwards, in order."""
        width = -(-width // _WIDTH_STEP) * _WIDTH_STEP
        shape = (num_slots, self._text.kv_heads, width, self._text.head_dim)
        kept = torch.tensor(list(keep), dtype=torch.int64, device=self._device)
        common = min(width, self.width)
        for caches in (self._keys, self._values):
            for index in range(len(self._text.layers)):  # one after the other, so that two of a layer are there at most
                cache = torch.zeros(shape, dtype=self._dtype, device=self._device)
                if len(keep):
                    cache[: len(keep), :, :common] = caches[index][kept, :, :common]
                if self.width:
                    caches[index] = cache
                else:
                    caches.append(cache)
        tokens, positions = (torch.zeros(num_slots, dtype=torch.int64, device=self._device) for _ in range(2))
        if len(keep):
            tokens[: len(keep)], positions[: len(keep)] = self._tokens[kept], self._positions[kept]
        self._tokens, self._positions = tokens, positions
        self._tables = self._text.tables(width)
        self.num_slots, self.width = num_slots, width
        self._graphs: dict[tuple[int, int], Graph[Choice]] = {}  # of these tensors

    @torch.inference_mode()
    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Rows in slots `sources` go to slots `targets`, none of which is among the sources."""
        old, new = (torch.tensor(list(slots), device=self._device) for slots in (sources, targets))
        for tensor in (*self._keys, *self._values, self._tokens, self._positions):
            tensor[new] = tensor[old]

    @torch.inference_mode()
    def prefill(self, slots: Sequence[int], embeddings: Tensor, num_positions: Sequence[int]) -> Choice:
        """Starts a row in each of `slots` from a prompt's embeddings [R, T, hidden], of which the first `num_positions`
        are its own; chooses the first token of each."""
        index = torch.tensor(list(slots), device=self._device)
        length = embeddings.shape[1]

        def write(layer: int, keys: Tensor, values: Tensor) -> None:
            self._keys[layer][index, :, :length] = keys
            self._values[layer][index, :, :length] = values

        last = torch.tensor(list(num_positions), device=self._device) - 1
        choice = self._choose(self._text.prefill(embeddings, self._tables, last, write))
        self._tokens[index] = choice.tokens
        self._positions[index] = last + 1
        return choice

    @torch.inference_mode()
    def prefill_ahead(self, embeddings: Tensor, num_positions: Sequence[int]) -> list[Prefilled]:
        """The same for rows that have no slots yet; from any thread."""
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def write(_: int, layer_keys: Tensor, layer_values: Tensor) -> None:
            keys.append(layer_keys)
            values.append(layer_values)

        last = torch.tensor(list(num_positions), device=self._device) - 1
        choice = self._choose(self._text.prefill(embeddings, self._text.tables(embeddings.shape[1]), last, write))
        return [
            Prefilled(
                [each[row, :, :length] for each in keys],
                [each[row, :, :length] for each in values],
                Choice(*(each[row : row + 1] for each in choice)),
            )
            for row, length in enumerate(num_positions)
        ]

    @torch.inference_mode()
    def place(self, slots: Sequence[int], rows: Sequence[Prefilled]) -> Choice:
        """Starts `rows` in `slots`."""
        for slot, row in zip(slots, rows, strict=True):
            length = row.keys[0].shape[1]
            for caches, given in ((self._keys, row.keys), (self._values, row.values)):
                for cache, own in zip(caches, given, strict=True):
                    cache[slot, :, :length] = own
            self._tokens[slot], self._positions[slot] = row.choice.tokens[0], length
        return Choice(*map(torch.cat, zip(*(row.choice for row in rows), strict=True)))

    def num_rows_for(self, num_rows: int) -> int:
        """The next number of slots that a step takes: few different ones, as each is a graph on CUDA."""
        if self._device.type == "cuda":
            return min(1 << max(num_rows - 1, 7).bit_length(), self.num_slots)
        return min(-(-num_rows // _ROW_STEP) * _ROW_STEP, self.num_slots)

    @torch.inference_mode()
    def step(self, num_rows: int, length: int) -> Choice:
        """Feeds the newest token of each of the first `num_rows` slots and chooses the next; no row that matters may be
        longer than `length` with it."""
        to = _GRAPH_LENGTH_STEP if self._device.type == "cuda" else _WIDTH_STEP
        length = min(-(-length // to) * to, self.width)
        if self._device.type != "cuda":
            return self._step(num_rows, length)
        key = num_rows, length
        if key not in self._graphs:
            state = self._tokens.clone(), self._positions.clone()  # what the warm-up moves on; the cache it writes anew
            self._graphs[key] = Graph(partial(self._step, num_rows, length))
            self._tokens.copy_(state[0])
            self._positions.copy_(state[1])
        return Choice(*(each.clone() for each in self._graphs[key]()))

    def _step(self, num_rows: int, length: int) -> Choice:
        tokens, next_positions = self._tokens[:num_rows], self._positions[:num_rows]
        positions = next_positions.clamp(max=self.width - 1)  # of slots whose row has ended
        x = self._text.step(self._embed(tokens), self._tables, positions, self._keys, self._values, length)
        choice = self._choose(x)
        tokens.copy_(choice.tokens)
        next_positions.add_(1).clamp_(max=self.width)
        return choice

    def _choose(self, x: Tensor) -> Choice:
        logits = self._lm_head(x)
        if self._has_kernels and not self.num_top:
            tokens, logprobs = best(logits)
            return Choice(tokens, logprobs, logprobs[:, None][:, :0], tokens[:, None][:, :0])
        logits = logits.float()
        highest, tokens = logits.max(dim=-1)
        total = logits.logsumexp(dim=-1)
        top, top_ids = (
            logits.topk(self.num_top, dim=-1) if self.num_top else (highest[:, None][:, :0], tokens[:, None][:, :0])
        )
        return Choice(tokens, highest - total, top - total[:, None], top_ids)
