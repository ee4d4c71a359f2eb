"""Text as token windows of one length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks


def token_windows(
    texts: Iterable[str | Sequence[int]], context: int, tokenizer: Any = None, *, bos: int | None = None, most: int | None = None
) -> Tensor:
    """Documents, one after the other, cut into ``[sequences, context]`` int64 windows for ``harvest`` and ``evaluate``.

    Args:
        texts: documents: texts (``tokenizer`` turns them into ids, without special tokens) or ids.
        context: tokens of a window.
        tokenizer: of Hugging Face, or anything that is called with a text and returns ``{"input_ids": [..]}``. Its ``bos_token_id`` and
            ``eos_token_id``, where it has them, begin every window and stand between documents.
        bos: begins every window instead.
        most: windows at most.

    The rest of the last document that fills no window is dropped. Raises: TypeError: a text without a tokenizer. ValueError: no window.
    """
    op = "token_windows"
    bos = getattr(tokenizer, "bos_token_id", None) if bos is None else checks.integer(op, "bos", bos, 0)
    eos = getattr(tokenizer, "eos_token_id", None)
    width = checks.integer(op, "context", context, 2 if bos is not None else 1) - (bos is not None)
    most = None if most is None else checks.integer(op, "most", most, 1)
    windows: list[list[int]] = []
    left: list[int] = []
    for text in texts:
        if isinstance(text, str):
            if tokenizer is None:
                raise TypeError(f"{op}: texts must be ids where no tokenizer is given, got a text")
            text = tokenizer(text, add_special_tokens=False)["input_ids"]
        left += [int(token) for token in text] + ([] if eos is None else [int(eos)])
        count = len(left) // width if most is None else min(len(left) // width, most - len(windows))
        windows += [([] if bos is None else [int(bos)]) + left[i * width : (i + 1) * width] for i in range(count)]
        left = left[count * width :]
        if most is not None and len(windows) >= most:
            break
    if not windows:
        raise ValueError(f"{op}: texts must fill at least one window of {context} tokens, got {len(left)} tokens")
    return torch.tensor(windows, dtype=torch.int64, device="cpu")
