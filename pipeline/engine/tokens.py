"""Where tokens stand in the text that they decode to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase


def token_ends(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], text: str) -> list[int]:
    """How many characters of `text`, their decoding without special tokens, are whole after each token.

    For byte-level BPE, whose regular tokens are strings of one character a byte.
    """
    special, added = set(tokenizer.all_special_ids), tokenizer.get_added_vocab()
    names = tokenizer.convert_ids_to_tokens(list(token_ids))
    sizes = [
        0 if token in special else len(name.encode()) if name in added else len(name)
        for token, name in zip(token_ids, names, strict=True)
    ]
    ends = np.cumsum(sizes, dtype=np.int64)
    data = np.frombuffer(text.encode(), np.uint8)
    if len(ends) == 0 or ends[-1] != len(data):  # bytes that are no UTF-8 became U+FFFD: decode every prefix
        prefixes = (tokenizer.decode(list(token_ids[: i + 1]), skip_special_tokens=True) for i in range(len(token_ids)))
        return [min(len(prefix.rstrip("\ufffd")), len(text)) for prefix in prefixes]
    begins = np.concatenate([np.flatnonzero((data & 0xC0) != 0x80), [len(data)]])  # byte where each character begins
    return [int(end) for end in np.searchsorted(begins, ends, side="right") - 1]
