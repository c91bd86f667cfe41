"""Forward hooks on a model's hook points, added for the duration of a block."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor

from caa_lens.errors import CaaLensWarning, InputError, MissingError
from caa_lens.models.base import Model

Hook = tuple[str, Callable[..., Any]]


def resid_post(layer: int) -> str:
    """TransformerLens' name of the output of block `layer`."""
    return f"blocks.{layer}.hook_resid_post"


def has_hooks(model: Model) -> bool:
    """Whether any forward hook is on the model now.

    Where one is, every text is run whole and by itself, as its author expects: in pieces, in a batch or beside other variants, the
    positions that it counts would be others.
    """
    return bool(hooked_points(model))


def hooked_points(model: Model) -> list[str]:
    """Names of the hook points that have a forward hook now."""
    return [name for name, point in model.hook_dict.items() if point.fwd_hooks]


@contextmanager
def hooks(model: Model, added: Sequence[Hook]) -> Iterator[Callable[[], None]]:
    """Adds forward hooks for the block's duration; yields a function that puts them back if `reset_hooks()` removed them.

    They stand among those of `model.hooks(...)` in the order of entry. TransformerLens' own context is not used: on a bridge it
    collects the names of all hook points again for every hook (about 10 ms each in a model of 30 layers). Where SAELens has put an
    SAE in the place of a hook point, the hooks act on what the SAE gives out.

    Raises:
        MissingError: the model has no hook point of that name.
        InputError: (when putting back) an SAE was put in the place of a hook point, or taken out of it, inside the block.
    """
    known = model.hook_dict
    names = [_point_name(model, known, name) for name, _ in added]
    points = [known[name] for name in names]
    installed: list[Any] = []  # TransformerLens' handles, one a hook

    def install() -> None:
        for point, (_, function) in zip(points, added, strict=True):
            point.add_hook(function)
            installed.append(point.fwd_hooks[-1])

    def remove() -> None:
        for point, handle in zip(points, installed, strict=False):
            handle.hook.remove()
            point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]
        installed.clear()

    def restore() -> None:
        if hasattr(model, "acts_to_saes") and any(
            model.hook_dict.get(name) is not point for name, point in zip(names, points, strict=True)
        ):
            raise InputError(
                "an SAE was spliced in or removed where the model is steered, which takes the steering hooks away; "
                "splice it in first and enter steer() inside."
            )
        if all(any(each is handle for each in p.fwd_hooks) for p, handle in zip(points, installed, strict=True)):
            return
        warnings.warn(
            "model.reset_hooks() removed the steering hooks inside steer(); they were added again, behind hooks "
            "that were added since. Leave the context to stop steering.",
            CaaLensWarning,
            stacklevel=2,
        )
        remove()
        install()

    try:
        install()
        yield restore
    finally:
        remove()


def _point_name(model: Model, known: Mapping[str, Any], name: str) -> str:
    found = next((each for each in (name, f"{name}.hook_sae_output") if each in known), None)
    if found is None:
        raise MissingError(f"{model.cfg.model_name} has no hook point {name!r}; model.hook_dict lists them.")
    return found


def capture_hooks(layers: Sequence[int], sink: Callable[[int, Float[Tensor, "batch pos d_model"]], None]) -> list[Hook]:
    """Hooks that hand `resid_post` of each layer to `sink(layer, activations)` and change nothing."""

    def at(layer: int) -> Hook:
        def capture_hook(activations: Tensor, hook: Any) -> None:
            sink(layer, activations)

        return resid_post(layer), capture_hook

    return [at(layer) for layer in layers]
