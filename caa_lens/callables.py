"""What a function computes, as data: two functions of one description give the same results, in this process or a later one.

A function is its code with its constants, its defaults, what it closes over, and the globals that it reads: a lambda with
another number in it is another one. One of this package is known by its name and what it closes over; one of another module that
a function calls, by its name.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caa_lens.errors import InputError
from caa_lens.vector import SteeringVector


def described(value: Any) -> Any:
    """A function, or a value that one holds on to, as what JSON can hold.

    Raises:
        InputError: it holds something whose content cannot be told (a model, an open file).
    """
    return _Description().of(value)


class _Description:
    def __init__(self) -> None:
        self.open: list[int] = []  # functions and objects that are being described: they may refer to themselves

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, (float, complex, bytes, range, torch.dtype, torch.device, type(Ellipsis))):
            return [type(value).__name__, repr(value)]
        if isinstance(value, (Tensor, np.ndarray, np.generic)):
            return _array(value)
        if isinstance(value, SteeringVector):
            return ["vector", value.layer, _array(value.tensor)]
        if isinstance(value, (list, tuple)):
            return [type(value).__name__, *map(self.of, value)]
        if isinstance(value, slice):
            return ["slice", *map(self.of, (value.start, value.stop, value.step))]
        if isinstance(value, (set, frozenset)):
            return [type(value).__name__, *sorted(map(self.of, value), key=repr)]
        if isinstance(value, (ModuleType, type, BuiltinFunctionType, np.ufunc)):
            return [getattr(value, "__module__", None), getattr(value, "__qualname__", value.__name__)]
        if isinstance(value, CodeType):
            return self.code(value)
        if id(value) in self.open:
            return ["itself", len(self.open) - self.open.index(id(value))]
        self.open.append(id(value))
        try:
            return self.whole(value)
        finally:
            self.open.pop()

    def whole(self, value: Any) -> Any:
        """What may refer to itself."""
        if isinstance(value, Mapping):
            return ["mapping", *sorted(([self.of(key), self.of(item)] for key, item in value.items()), key=repr)]
        if isinstance(value, functools.partial):
            return ["partial", *map(self.of, (value.func, value.args, value.keywords))]
        if isinstance(value, MethodType):
            return ["method", self.of(value.__func__), self.of(value.__self__)]
        if isinstance(value, FunctionType):
            return self.function(value)
        if is_dataclass(value) or (callable(value) and hasattr(value, "__dict__") and not _is_big(value)):
            names = [field.name for field in fields(value)] if is_dataclass(value) else sorted(vars(value))
            return [self.kind(type(value)), *([name, self.of(getattr(value, name))] for name in names)]
        raise InputError(
            f"a function given with store= holds a {type(value).__name__}, whose content cannot be told, so that its results would "
            "be taken for those of another function; let it hold numbers, text and tensors only, or leave store= out."
        )

    def function(self, function: FunctionType) -> Any:
        while function.__globals__.get("__name__", "").startswith("jaxtyping.") and hasattr(function, "__wrapped__"):
            function = function.__wrapped__  # the wrapper checks annotations
        held = [self.of(_content(cell)) for cell in function.__closure__ or ()]
        name = [function.__module__, function.__qualname__]
        if str(function.__module__).partition(".")[0] == "caa_lens":
            return [*name, *held]
        given = [self.of(function.__defaults__), self.of(function.__kwdefaults__)]
        read = [[each, self.foreign(function, function.__globals__[each])] for each in _global_names(function)]
        return [self.code(function.__code__), held, given, read]

    def kind(self, cls: type) -> Any:
        """What an object of a class has from it, and from those of the same module that it is made of."""
        return [
            [
                self.of(each),
                *(
                    [name, self.of(_plain(content))]
                    for name, content in sorted(vars(each).items())
                    if _counts(name, content)
                ),
            ]
            for each in cls.__mro__
            if each.__module__ == cls.__module__
        ]

    def foreign(self, function: FunctionType, value: Any) -> Any:
        """A global that a function reads: another module's function is known by its name."""
        if isinstance(value, FunctionType) and value.__module__ != function.__module__:
            return [value.__module__, value.__qualname__]
        return self.of(value)

    def code(self, code: CodeType) -> Any:
        return [code.co_code.hex(), list(code.co_names), [self.of(constant) for constant in code.co_consts]]


def _counts(name: str, content: Any) -> bool:
    """Whether something in a class is a method or a value of its author's; slots are in the objects."""
    special = name.startswith("__") and name != "__call__"
    return not special and not isinstance(content, (MemberDescriptorType, GetSetDescriptorType))


def _plain(content: Any) -> Any:
    if isinstance(content, property):
        return content.fget
    return content.__func__ if isinstance(content, (staticmethod, classmethod)) else content


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _global_names(function: FunctionType) -> list[str]:
    """Names that the code, and the code inside it, look up among the globals."""
    todo, names = [function.__code__], set[str]()
    while todo:
        code = todo.pop()
        names.update(code.co_names)
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return sorted(names & function.__globals__.keys())


def _array(value: Any) -> Any:
    tensor = torch.as_tensor(value).detach().cpu().contiguous()
    content = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return [str(tensor.dtype), list(tensor.shape), content]


def _is_big(value: Any) -> bool:
    """Modules and tokenizers can be called, and hold more than can be told."""
    return isinstance(value, torch.nn.Module) or type(value).__module__.partition(".")[0] in (
        "transformers",
        "tokenizers",
    )
