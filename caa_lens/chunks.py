"""Work in pieces that fit into memory: as many items together as the last success allows, halved when memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory does not suffice: a GPU's, Python's, or that of PyTorch's allocator on the CPU, which is a
    plain `RuntimeError`."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


class Chunks:
    """Runs a function over pieces of a sequence; what was found to fit is remembered from call to call.

    Args:
        budget: tokens (or other units of size) that are in the model together, at first.
    """

    def __init__(self, budget: int = 4096) -> None:
        self.budget = budget

    def map(
        self, run: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], *, size: int
    ) -> list[Result]:
        """One result an item, in their order.

        Args:
            run: takes several items together and gives one result for each.
            items: what to run.
            size: of one item, in the budget's units.

        Raises:
            torch.OutOfMemoryError, MemoryError, RuntimeError: a single item does not fit.
        """
        found: list[Result] = []
        while len(found) < len(items):
            chunk = items[len(found) : len(found) + max(1, self.budget // size)]
            try:
                found += run(chunk)
            except (RuntimeError, MemoryError) as error:
                if len(chunk) == 1 or not out_of_memory(error):
                    raise
                self.budget = len(chunk) // 2 * size
        return found
