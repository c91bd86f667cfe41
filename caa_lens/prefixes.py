"""KV caches of what texts begin with, every distinct beginning run once.

A text's prefix is its tokens before the first that a pair's completions, or a sweep's settings, make different. Behind a
chat template many prefixes begin alike (a system prompt, worked examples): that head is run once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from caa_lens.models import Model, Prefix, device_of, pad, run


class PrefixRunner:
    """Runs prefixes behind a head that all of them share; the head's own pass is made when it is first needed."""

    def __init__(self, model: Model, head: tuple[int, ...]) -> None:
        self.model, self.head = model, head
        self.device = device_of(model)
        self._cached_head: Prefix | None = None

    def run(self, prefixes: Sequence[tuple[int, ...]]) -> Prefix | None:
        """One cache row a prefix, in order; None where all are empty. Each begins with the head."""
        if not any(prefixes):
            return None
        distinct = list(dict.fromkeys(prefixes))
        rest = [prefix[len(self.head) :] for prefix in distinct]
        past = self._expanded_head(len(distinct))
        if any(rest):
            tokens, mask = pad(rest, side="right", device=self.device)
            _, past = run(self.model, tokens, mask, past=past, grow=True)
        assert past is not None
        index = [distinct.index(prefix) for prefix in prefixes]
        if index != list(range(len(distinct))):
            past.select(torch.tensor(index, device=self.device))
        return past

    def _expanded_head(self, rows: int) -> Prefix | None:
        if not self.head:
            return None
        if self._cached_head is None:
            tokens, mask = pad([self.head], side="right", device=self.device)
            _, self._cached_head = run(self.model, tokens, mask, grow=True)
        assert self._cached_head is not None
        return self._cached_head.rows(torch.zeros(rows, dtype=torch.long, device=self.device))


def common_head(rows: Sequence[tuple[int, ...]], *, limit: int) -> tuple[int, ...]:
    """The leading ids that all rows share, at most `limit` of them."""
    first, last = min(rows), max(rows)  # the rows that differ earliest
    same = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: min(limit, next(same, min(len(first), len(last))))]
