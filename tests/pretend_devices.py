"""Devices that this machine does not have: tensors on them hold real numbers in the CPU's memory and refuse to meet others.

    with pretend_devices():
        model.blocks[2].to(device(1))        # from here on as strict as a second GPU

Allowed across devices is what PyTorch allows: copies, numbers (tensors without axes) of the CPU, and index tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
CPU = torch.device("cpu")
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class Placed(Tensor):
    """A tensor that says it is on a pretended device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Placed:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Placed({self.inner}, {self.device})"


_setup_privateuseone_for_python_backend()  # a type of device that PyTorch keeps for others


def device(index: int) -> torch.device:
    """A pretended device."""
    return torch.device("privateuseone", index)


@contextmanager
def pretend_devices() -> Iterator[None]:
    """Makes tensors that are created on, or moved to, a pretended device be there."""
    with _Operations(), _Numbers():
        yield


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """`torch.tensor(numbers, device=...)` and `tolist()` are no operations that a dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        place = kwargs.pop("device", None) if func is torch.tensor else None
        found = func(*args, **kwargs)
        return found if place is None else found.to(place)


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    real_args = _real(args, tensors)
    real_kwargs = {name: _real(value, tensors) for name, value in kwargs.items()}
    target = kwargs.get("device")
    if target is None:
        target = args[0].device if func in COPIES else _home(func, tensors)
    if real_kwargs.get("device") is not None:
        real_kwargs["device"] = CPU
    found = func(*real_args, **real_kwargs)
    if func._schema.is_mutable and func._schema.name.endswith("_"):
        return args[0]
    if target == CPU:
        return found
    if isinstance(found, Tensor):
        return Placed(found, target)
    return tree_map(lambda x: Placed(x, target) if isinstance(x, Tensor) else x, found)


def _real(x: Any, tensors: list[Tensor]) -> Any:
    """An argument with real tensors in the place of pretending ones; notes all that were there."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return x.inner if isinstance(x, Placed) else x
    return type(x)(_real(each, tensors) for each in x) if type(x) in (list, tuple) else x


def _home(func: Any, tensors: list[Tensor]) -> torch.device:
    """The device of an operation; refuses several."""
    places = {x.device for x in tensors if x.device != CPU}
    beside = [x for x in (tensors[1:] if func not in INDEXED else []) + tensors[:1] if x.device == CPU and x.ndim]
    if len(places) > 1 or (places and beside):
        raise RuntimeError(f"{func} met tensors on {', '.join(str(x.device) for x in tensors)}")
    return places.pop() if places else CPU
