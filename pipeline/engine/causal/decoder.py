"""The text decoder over streams: what each has heard stays in its slot's cache, what it said is checked anew.

A slot holds keys and values of [prompt head, audio so far]. New audio goes behind them; behind that come the prompt's
tail and the last hypothesis, all in one pass over many streams. The pass says of every place of the hypothesis what
greedy decoding would choose there: up to the first difference the hypothesis stands, and decoding goes on from it. The
tokens are those of plain greedy decoding, without the hypothesis (qwen3_asr_causal 0.1.0, model.py:
`generate_full_hypothesis_rolling`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from qwen_asr.core.transformers_backend.modeling_qwen3_asr import Qwen3ASRThinkerForConditionalGeneration
from torch import Tensor

from pipeline.engine.causal.penalties import Penalties, penalize
from pipeline.engine.cpu_attention import attend
from pipeline.engine.decoder import SlotDecoder
from pipeline.engine.int4 import Int4Weight

_LOGITS_AT_ONCE = 1 << 24
_LENGTH_STEP = 64


@dataclass(frozen=True, slots=True)
class Addition:
    """What is new of a stream: `ids` from position `start` of `slot` on, of which those equal to the audio token stand
    for embeddings, and the last are `draft`."""

    slot: int
    start: int
    ids: Sequence[int]
    draft: Sequence[int]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The next token of a stream after `num_accepted` of its draft, and log-probabilities of all of them, the token's
    the last; NaN where logits are."""

    num_accepted: int
    token: int
    logprobs: list[float]


class StreamDecoder(SlotDecoder):
    """Greedy decoding under `penalties`. `extend` takes what is new of some streams, `step` moves streams one token on.
    A slot may wait for as long as it likes between two calls."""

    def __init__(
        self,
        thinker: Qwen3ASRThinkerForConditionalGeneration,
        num_slots: int,
        width: int,
        penalties: Penalties,
        int4: Mapping[str, Int4Weight] | None = None,
    ) -> None:
        """`width` are the positions of a slot: prompt, audio and hypothesis."""
        self._penalties = penalties
        self._audio_token_id: int = thinker.config.audio_token_id
        self._history = self._sizes = torch.empty(0, dtype=torch.int64)
        super().__init__(thinker, num_slots, width, int4)

    def resize(self, num_slots: int, width: int, keep: Sequence[int] = ()) -> None:
        """See SlotDecoder."""
        kept = torch.tensor(list(keep), dtype=torch.int64, device=self._device)
        history = torch.zeros(num_slots, width, dtype=torch.int64, device=self._device)
        sizes = torch.zeros(num_slots, dtype=torch.int64, device=self._device)
        if len(keep):
            common = min(width, self._history.shape[1])
            history[: len(keep), :common], sizes[: len(keep)] = self._history[kept, :common], self._sizes[kept]
        super().resize(num_slots, width, keep)
        self._history, self._sizes = history, sizes

    @property
    def bytes_per_slot(self) -> int:
        return sum(cache[0].numel() * cache.element_size() for cache in (*self._keys, *self._values))

    @torch.inference_mode()
    def clear(self, slots: Sequence[int]) -> None:
        """Forgets what is not finite there, as StreamTower does."""
        for cache in (*self._keys, *self._values):
            cache[list(slots)] = 0

    @torch.inference_mode()
    def extend(self, additions: Sequence[Addition], audio: Tensor) -> list[Chosen]:
        """`audio` [n, hidden] are the embeddings of all audio tokens among the additions, in order."""
        lengths = [len(each.ids) for each in additions]
        checked = [len(each.draft) + 1 for each in additions]  # places whose next token is asked for
        ids = torch.tensor([token for each in additions for token in each.ids], device=self._device)
        x = self._embed(ids)
        x[ids == self._audio_token_id] = audio.to(x.dtype)
        x = self._through_layers(x, additions, lengths, checked)
        drafts = torch.zeros(len(additions), max(checked) - 1, dtype=torch.int64)
        for row, each in zip(drafts, additions, strict=True):
            row[: len(each.draft)] = torch.tensor(each.draft, dtype=torch.int64)
        row_of, size_of = _places(checked)
        tokens, logprobs = self._greedy(x, drafts.to(self._device), row_of.to(self._device), size_of.to(self._device))
        ends = list(accumulate(checked))
        found = [
            _first_difference(each.draft, tokens[end - count : end], logprobs[end - count : end])
            for each, end, count in zip(additions, ends, checked, strict=True)
        ]
        self._begin(additions, found)
        return found

    @torch.inference_mode()
    def step(self, slots: Sequence[int]) -> tuple[list[int], list[float]]:  # type: ignore[override]
        """Feeds the newest token of each of `slots`: the tokens chosen next and their log-probabilities."""
        rows = torch.tensor(list(slots), device=self._device)
        positions = self._positions[rows]
        cos, sin = self._tables[0][positions][:, None], self._tables[1][positions][:, None]
        x = self._embed(self._tokens[rows])
        for layer, keys, values in zip(self._text.layers, self._keys, self._values, strict=True):
            q, k, v = self._text.qkv(layer, x, cos, sin)  # [B, heads, head_dim]
            keys[rows, :, positions] = k
            values[rows, :, positions] = v
            q = q.unflatten(1, (self._text.kv_heads, -1))
            if self._has_kernels:
                mixed = attend(q, keys, values, positions, rows)
            else:
                length = self._rounded(int(positions.max()) + 1)
                seen = (torch.arange(length, device=self._device) <= positions[:, None])[:, None, None]
                mixed = F.scaled_dot_product_attention(
                    q, keys[rows, :, :length], values[rows, :, :length], attn_mask=seen
                )
            x = x + layer.out(mixed.flatten(1))
            x = x + self._text.mlp(layer, x)
        sizes = self._sizes[rows]
        history = self._history[rows, : int(sizes.max())]
        tokens, logprobs = self._greedy(x, history, torch.arange(len(rows), device=self._device), sizes)
        said = torch.tensor(tokens, device=self._device)
        self._tokens[rows], self._positions[rows] = said, positions + 1
        self._history[rows, sizes], self._sizes[rows] = said, sizes + 1
        return tokens, logprobs

    def _through_layers(
        self, x: Tensor, additions: Sequence[Addition], lengths: Sequence[int], checked: Sequence[int]
    ) -> Tensor:
        """Embeddings of all additions behind each other [N, hidden] -> [sum(checked), hidden] of their last places."""
        row_of, place_of = _places(lengths)
        starts = torch.tensor([each.start for each in additions])
        positions = (starts[row_of] + place_of).to(self._device)
        slots = torch.tensor([each.slot for each in additions])
        slot_of = slots[row_of].to(self._device)
        slots = slots.to(self._device)
        most = self._rounded(int((starts + torch.tensor(lengths)).max()))
        cos, sin = self._tables[0][positions][:, None], self._tables[1][positions][:, None]
        every = _Queries(row_of, place_of, positions, len(additions), most)
        last = torch.cat([
            torch.arange(end - count, end) for end, count in zip(accumulate(lengths), checked, strict=True)
        ])  # fmt: skip
        last_row, last_place = _places(checked)
        wanted = _Queries(last_row, last_place, positions[last.to(self._device)], len(additions), most)
        last = last.to(self._device)
        for layer, keys, values in zip(self._text.layers, self._keys, self._values, strict=True):
            q, k, v = self._text.qkv(layer, x, cos, sin)  # [N, heads, head_dim]
            keys[slot_of, :, positions] = k
            values[slot_of, :, positions] = v
            queries = every
            if layer is self._text.layers[-1]:  # from here on only what is asked for matters
                x, q, queries = x[last], q[last], wanted
            mixed = queries.attend(q, keys[slots, :, :most], values[slots, :, :most])
            x = x + layer.out(mixed)
            x = x + self._text.mlp(layer, x)
        return x

    def _greedy(self, x: Tensor, histories: Tensor, row_of: Tensor, sizes: Tensor) -> tuple[list[int], list[float]]:
        """The likeliest tokens under the penalties after x [M, hidden], where m has said the first `sizes[m]` tokens of
        `histories[row_of[m]]`, and their log-probabilities without penalties."""
        tokens, logprobs = [], []
        at_once = max(1, _LOGITS_AT_ONCE // self._embed.num_embeddings)
        for part, rows, said in zip(x.split(at_once), row_of.split(at_once), sizes.split(at_once), strict=True):
            logits = self._lm_head(self._text.norm_of(part, self._text.last_norm)).float()
            best = penalize(logits, histories[rows], said, self._penalties).argmax(dim=-1)
            chosen = logits.gather(1, best[:, None])[:, 0] - logits.logsumexp(dim=-1)
            tokens += best.tolist()
            logprobs += chosen.tolist()
        return tokens, logprobs

    def _begin(self, additions: Sequence[Addition], found: Sequence[Chosen]) -> None:
        """Slots are ready for a step after what of their drafts stands, and the token behind it."""
        rows = torch.tensor([each.slot for each in additions], device=self._device)
        said = [[*each.draft[: one.num_accepted], one.token] for each, one in zip(additions, found, strict=True)]
        history = torch.zeros(len(said), max(map(len, said)), dtype=torch.int64)
        for row, tokens in zip(history, said, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        ends = [
            each.start + len(each.ids) - len(each.draft) + one.num_accepted
            for each, one in zip(additions, found, strict=True)
        ]
        self._history[rows, : history.shape[1]] = history.to(self._device)
        self._sizes[rows] = torch.tensor([len(tokens) for tokens in said], device=self._device)
        self._tokens[rows] = torch.tensor([one.token for one in found], device=self._device)
        self._positions[rows] = torch.tensor(ends, device=self._device)

    def _rounded(self, length: int) -> int:
        return min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, self.width)


class _Queries:
    """Places of some rows, packed behind each other, for attention that wants them padded."""

    def __init__(self, row_of: Tensor, place_of: Tensor, positions: Tensor, num_rows: int, length: int) -> None:
        device = positions.device
        self._row_of, self._place_of = row_of.to(device), place_of.to(device)
        self._shape = num_rows, int(place_of.max()) + 1
        bounds = torch.zeros(self._shape, dtype=torch.int64, device=device)  # a query of nobody sees the first place
        bounds[self._row_of, self._place_of] = positions
        self._seen = torch.arange(length, device=device) <= bounds[..., None]  # [R, T, length]

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q [N, heads, head_dim] over keys and values [R, kv_heads, length, head_dim] -> [N, heads * head_dim]."""
        num_rows, width = self._shape
        kv_heads = keys.shape[1]
        group = q.shape[1] // kv_heads
        padded = q.new_zeros(num_rows, width, *q.shape[1:])
        padded[self._row_of, self._place_of] = q
        # query heads of a key head stand where other queries would: no key is repeated
        folded = padded.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        seen = self._seen[:, None].expand(-1, group, -1, -1).flatten(1, 2)[:, None]
        mixed = F.scaled_dot_product_attention(folded, keys, values, attn_mask=seen)
        unfolded = mixed.unflatten(2, (group, width)).permute(0, 3, 1, 2, 4)  # [R, T, kv_heads, group, head_dim]
        packed: Tensor = unfolded[self._row_of, self._place_of].flatten(1)
        return packed


def _places(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of rows of these lengths behind each other: which row an element is of, and its place in it."""
    row_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return row_of, torch.cat([torch.arange(length) for length in lengths])


def _first_difference(draft: Sequence[int], tokens: Sequence[int], logprobs: list[float]) -> Chosen:
    """`tokens` are chosen after each beginning of the draft, the empty and the whole one included."""
    same = next((at for at, said in enumerate(draft) if tokens[at] != said), len(draft))
    return Chosen(same, tokens[same], logprobs[: same + 1])
