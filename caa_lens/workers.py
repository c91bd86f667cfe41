"""Several processes that share one piece of work, as `accelerate launch` and `torchrun` start them, on one machine or more.

    shared_map(run, items) = run(items[0]), run(items[1]), ...      item i is run by process i mod count

All processes make the same calls. They go in rounds, one item each, and exchange what they found, so that each of them sees every
result, in the order in which a single process finds them: whatever is made of results (sums, tables) comes out alike, bit by bit.
An item is a batch that is formed without regard to the number of processes. One process is the plain case: nothing is exchanged.

Results travel through gloo, on the CPU, also where the processes' own group is of another kind (nccl).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from caa_lens.errors import CaaLensError, CaaLensWarning, InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = timedelta(hours=6)
"""How long a process waits for a slower one (which may be loading its model). One that has ended is noticed at once."""

_ALONE: ContextVar[bool] = ContextVar("caa_lens_alone", default=False)
_exchange: tuple[Any, Any] | None = None  # the default group, and the gloo group of the same processes


def count() -> int:
    """Number of processes; 1 where none were launched together, and inside `alone()`.

    The first call joins the processes, if the launcher has not: then it waits for the others.
    """
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _joined() else 0


def is_main() -> bool:
    """Whether this process is the one that writes files, shows progress and prints."""
    return rank() == 0


def local_rank() -> int:
    """This process's number on its machine, which is that of its GPU; waits for nobody."""
    known = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return int(os.environ.get("LOCAL_RANK", known))


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works for itself: what it calls is not shared, and the others need not call it.

    Example:
        >>> if caa_lens.workers.is_main():  # doctest: +SKIP
        ...     with caa_lens.workers.alone():
        ...         caa.score(model, held_out, v)
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def shared_map(run: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yields `run(item)` for every item, in order, on every process; each item is run by one of them.

    Args:
        run: its results are pickled where there are several processes, so a tensor should not be a view of a larger one.
        items: the same on every process.

    Raises:
        CaaLensError: `run` failed on another process. What it raises on this one is raised on.
    """
    if count() == 1:
        yield from map(run, items)
        return
    for first in range(0, len(items), count()):
        mine = items[first + rank() : first + rank() + 1]  # in the last round some have none
        for found in gather(lambda mine=mine: [run(item) for item in mine]):  # type: ignore[misc]
            yield from found


def gather(work: Callable[[], Result]) -> list[Result]:
    """What `work()` gives on each process, by rank, on every process.

    Raises:
        CaaLensError: it failed on another process. What it raises on this one is raised on.
    """
    if count() == 1:
        return [work()]
    own: Exception | None = None
    mine: Result | _Failure
    try:
        mine = work()
    except Exception as error:
        own, mine = error, _Failure(str(error) if isinstance(error, CaaLensError) else repr(error))
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, mine, group=_gloo())
    if own is not None:
        raise own
    for number, result in enumerate(found):
        if isinstance(result, _Failure):
            raise CaaLensError(f"process {number} of {count()} failed: {result.message}")
    return found


def on_main(work: Callable[[], Result]) -> Result:
    """Does `work` on the main process only; every process gets what it gives."""
    return gather(work if is_main() else lambda: None)[0]  # type: ignore[return-value]


def require_same(value: str, what: str) -> None:
    """Refuses to share work that is not the same on every process.

    Args:
        value: a digest of the work.
        what: the work, for the message.

    Raises:
        InputError: the digests differ.
    """
    if len(set(gather(lambda: value))) > 1:
        raise InputError(
            f"{what}: the processes were asked for different work; all must make the same calls with the same arguments, in "
            "the same order. Work of one process alone goes into `with caa_lens.workers.alone():`."
        )


@dataclass(frozen=True)
class _Failure:
    message: str


def _joined() -> bool:
    """Whether there are other processes to work with; joins those that a launcher announces in the environment."""
    if _ALONE.get() or not dist.is_available():
        return False
    if dist.is_initialized():
        return True
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=PATIENCE)
        return True
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        warnings.warn(
            "accelerate was asked for several processes and started one, as it does with --cpu; use `accelerate launch "
            "--multi_gpu --num_processes N` (with or without GPUs), or `torchrun --nproc-per-node N`.",
            CaaLensWarning,
            stacklevel=2,
        )
    return False


def _gloo() -> Any:
    global _exchange
    if _exchange is None or _exchange[0] is not dist.group.WORLD:
        _exchange = dist.group.WORLD, dist.new_group(backend="gloo", timeout=PATIENCE)
    return _exchange[1]
