"""Steering as TransformerLens hook functions.

    x[pos] <- operator(x[pos], v, strength)   at blocks.<l>.hook_resid_post, where the position mask is true

A hook never edits in place (an earlier hook may have stored the same tensor) and never promotes the residual stream's dtype.
Several vectors act in the order given. Hooks at one point act in the order in which they were added: a user's hook that was added
before sees unsteered activations, one added inside the context or passed to `run_with_hooks` sees steered ones, and so
does `run_with_cache`. Where SAELens has spliced an SAE in at the same point, the vector is added to what the SAE gives out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caa_lens.directions import Operator, Strength, add
from caa_lens.errors import InputError
from caa_lens.models import Hook, Inputs, Model, check_layers, describe, tokenizer_of
from caa_lens.positions import Positions, PositionTracker, check_positions, needs_marker
from caa_lens.prompts import Template
from caa_lens.templates import default_template
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet

Vectors = SteeringVector | VectorSet | Iterable[SteeringVector | VectorSet]


def flatten(model: Model, vectors: Vectors) -> list[SteeringVector]:
    """The vectors to apply, in order, after checking that they fit the model.

    Raises:
        InputError: no vector, another width, or made on another model; `retarget()` is the way to transfer on purpose.
        MissingError: a layer that the model does not have.
    """
    groups = [vectors] if isinstance(vectors, (SteeringVector, VectorSet)) else list(vectors)
    flat: list[SteeringVector] = []
    for group in groups:
        if not isinstance(group, (SteeringVector, VectorSet)):
            raise InputError(
                f"steering takes a SteeringVector, a VectorSet or a list of them; got {type(group).__name__}. A bare tensor "
                "becomes one with SteeringVector(tensor, layer, Provenance(...))."
            )
        flat += [group] if isinstance(group, SteeringVector) else group.values()
    if not flat:
        raise InputError("no vector to steer with; give at least one.")
    info = describe(model)
    for vector in flat:
        if vector.provenance.d_model != info.d_model:
            raise InputError(
                f"{vector!r} has width {vector.provenance.d_model}, {info.name} has d_model {info.d_model}; extract the "
                "vector from this model."
            )
        if not info.same_model(vector.provenance.model):
            raise InputError(
                f"{vector!r} was made on {vector.provenance.model}, this is {info.name}; extract it from this model, or "
                f"transfer it on purpose with .retarget({info.name!r})."
            )
        check_layers(model, [vector.layer])
    return flat


def template_for(model: Model, template: Template | None) -> Template:
    """The given template, or the default of the model or of the one that it was tuned from."""
    return template or default_template(describe(model).base, model.tokenizer)


def steering_hook(
    vector: SteeringVector,
    mask: Callable[[Float[Tensor, "batch pos d_model"]], Bool[Tensor, "batch pos"] | None],
    *,
    operator: Operator = add,
    strength: float | Float[Tensor, " batch"] = 1.0,
) -> Hook:
    """A `(hook_name, function)` that applies one vector where `mask(activations)` is true (None: everywhere)."""
    unsteered = not bool(vector.tensor.any())
    size: Strength = strength.reshape(-1, 1, 1).float() if isinstance(strength, Tensor) else strength

    @functools.lru_cache(maxsize=8)
    def direction(device: torch.device) -> Tensor:
        return vector.tensor.to(device)

    def steer_hook(activations: Tensor, hook: Any) -> Tensor | None:
        on = mask(activations)
        if unsteered:
            return None
        amount = size
        if isinstance(amount, Tensor):
            if len(amount) != len(activations):
                raise InputError(
                    f"strength has {len(amount)} entries, one a row, but the batch has {len(activations)} rows; give one "
                    "for each row that is run together."
                )
            amount = amount.to(activations.device)
        steered = operator(activations, direction(activations.device), amount)
        if on is None or bool(on.all()):
            return steered
        return torch.where(on.to(activations.device).unsqueeze(-1), steered, activations)

    return vector.hook_name, steer_hook


def steering_hooks(
    model: Model,
    vectors: Vectors,
    *,
    positions: Positions = "after_instruction",
    tokens: Int[Tensor, "batch pos"] | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    operator: Operator = add,
    strength: float | Float[Tensor, " batch"] = 1.0,
    template: Template | None = None,
) -> list[Hook]:
    """Plain TransformerLens hooks that steer, for `run_with_hooks` or `model.hooks`, beside your own.

    Plain hooks see activations, not tokens, so a choice of positions that depends on the prompt needs `tokens=`. Such
    hooks serve one prompt and its cached continuation; a forward pass as long as the prompt starts them anew. A prompt of one token
    looks like a step of its continuation: every pass of one token behind the first is taken for such a step, so make new
    hooks to run the prompt again. `steer` needs none of this.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        vectors: a `SteeringVector`, a `VectorSet` (all its layers), or a list of them, applied in the order given.
        positions: which tokens are steered; see `caa_lens.positions`.
        tokens: the prompt that will be run, `[batch, pos]`.
        attention_mask: 1 for its real tokens; left out, all are.
        operator: `add`, `ablate`, `clamp`, or a gate.
        strength: the operator's strength, one for all or one a row of the batch.
        template: how the prompt is written; the model's default otherwise.

    Returns:
        `[(hook_name, function), ...]`.

    Raises:
        InputError: vectors that do not fit, unknown positions, or positions that depend on a prompt that is not given.

    Example:
        >>> hooks = caa.steering_hooks(model, 1.5 * v, positions="all")  # doctest: +SKIP
        >>> model.run_with_hooks(tokens, fwd_hooks=hooks + my_hooks)  # doctest: +SKIP
    """
    flat = flatten(model, vectors)
    check_positions(positions)
    if tokens is None:
        if isinstance(positions, str) and positions == "all":
            return [steering_hook(v, lambda x: None, operator=operator, strength=strength) for v in flat]
        raise InputError(
            f"positions={positions!r} depends on the prompt, which plain hooks cannot see; pass tokens= (and attention_mask= "
            "if it is padded), use positions='all', or use `with steer(...)`."
        )
    if needs_marker(positions):
        tokenizer_of(model)
    chosen = template_for(model, template)

    def counter() -> Callable[[Tensor], Tensor | None]:
        tracker, seen = PositionTracker(model, positions, chosen), 0

        def mask(activations: Tensor) -> Tensor | None:
            nonlocal seen
            batch, length = activations.shape[:2]
            if len(tokens) not in (1, batch):
                raise InputError(
                    f"hooks made for {len(tokens)} rows of tokens saw a batch of {batch}; make them from the tokens that you run."
                )
            if length == tokens.shape[1] and not (length == 1 and seen):
                seen = 0
            elif seen == 0 or callable(positions):
                raise InputError(
                    f"hooks made for a prompt of {tokens.shape[1]} tokens saw a forward pass of {length}"
                    + (" behind it" if seen else "")
                    + "; make them from the tokens that you run, or use `with steer(...)`."
                )
            new = tokens if seen == 0 else torch.zeros(batch, length, dtype=torch.long)
            real = attention_mask if seen == 0 else None
            tracker.see(Inputs(new, real, seen, (batch, length)))
            seen += length
            return tracker.current

        return mask

    # One counter a hook: each sees every forward pass once. The first one is resolved now, so that a missing or
    # ambiguous marker is refused before the model runs.
    PositionTracker(model, positions, chosen).see(Inputs(tokens, attention_mask, 0, (tokens.shape[0], tokens.shape[1])))
    return [steering_hook(v, counter(), operator=operator, strength=strength) for v in flat]
