"""How a vector was made, carried by the vector itself: it says what it is, and what it does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from caa_lens.errors import InputError


def bare_name(model: str) -> str:
    """A model's name without organisation and case."""
    return model.rsplit("/", 1)[-1].lower()


def same_model(name: str, other: str) -> bool:
    """Whether two names are of one model: they agree, organisation and case aside."""
    return bare_name(name) == bare_name(other)


@dataclass(frozen=True)
class Provenance:
    """How a vector was made; everything needed to make it again or to see that it does not fit.

    Attributes:
        model, revision: the model's name and, for a hub model, its commit.
        n_layers, d_model: its shape.
        basis: the weights' basis: `"raw"`, `"folded"` (norm weights folded: the residual stream is unchanged) or
            `"centred"` (each position's mean removed).
        expression: the behaviour, and the algebra done since (`"1.5 * formality"`).
        n_pairs, pairs_hash, prompt_digests: the training pairs.
        template, template_hash, read: how they were written and at which token they were read.
        normalized_across: names of the behaviours whose norms were averaged, if any.
        versions: of the libraries at extraction.
    """

    model: str
    n_layers: int
    d_model: int
    basis: str = "raw"
    revision: str | None = None
    expression: str = "vector"
    n_pairs: int = 0
    pairs_hash: str | None = None
    prompt_digests: tuple[str, ...] = field(default=(), repr=False)
    template: str | None = None
    template_hash: str | None = None
    read: str | None = None
    normalized_across: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def combined(self, other: Provenance, symbol: str) -> Provenance:
        """Provenance of a sum or a difference; refuses vectors that live in different residual streams."""
        for key, remedy in (
            ("d_model", "only vectors of equal width can be added"),
            ("model", "retarget() one of them if this is on purpose"),
            ("basis", "to_basis('centred') makes a raw vector fit a centred one"),
        ):
            mine, theirs = getattr(self, key), getattr(other, key)
            alike = same_model(mine, theirs) if key == "model" else {mine, theirs} == {"raw", "folded"}
            if mine != theirs and not alike:
                raise InputError(f"vectors of {key} {mine!r} and {theirs!r} cannot be combined; {remedy}.")
        same = {f.name: getattr(self, f.name) for f in fields(self)}
        for key in ("pairs_hash", "template", "template_hash", "read", "normalized_across"):
            if getattr(self, key) != getattr(other, key):
                same[key] = () if key == "normalized_across" else None
        same["n_pairs"] = self.n_pairs + other.n_pairs
        same["prompt_digests"] = tuple(sorted({*self.prompt_digests, *other.prompt_digests}))
        same["expression"] = f"({self.expression} {symbol} {other.expression})"
        return Provenance(**same)
