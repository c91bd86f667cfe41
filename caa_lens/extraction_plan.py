"""What an extraction will run, checked before it does: encoded pairs, the positions to read, batches of like length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from caa_lens.arguments import Layers, require_count, require_pairs
from caa_lens.errors import InputError
from caa_lens.files import digest
from caa_lens.hooks import template_for
from caa_lens.models import Model, ModelInfo, check_layers, describe, tokenizer_of, weight_basis
from caa_lens.pairs import PairSet
from caa_lens.prompts import EncodedPair, Prompt, Template
from caa_lens.provenance import bare_name

Read = Literal["answer", "completion_mean", "last"] | int


@dataclass(frozen=True)
class ExtractionPlan:
    """Checked inputs of an extraction: encoded pairs, positions to read, batches of like length."""

    pairs: PairSet
    encoded: tuple[EncodedPair, ...]
    layers: tuple[int, ...]
    read: Read
    template: Template
    info: ModelInfo
    basis: str
    batches: tuple[tuple[int, ...], ...]

    @property
    def signature(self) -> str:
        """Digest of everything but the model's state that the activations depend on, and of how they are cut into batches."""
        name = bare_name(self.info.name)
        pairs = [[pair.prompt, pair.positive, pair.negative] for pair in self.pairs]
        ids = [[both.positive.ids, both.negative.ids] for both in self.encoded]
        return digest([name, self.basis, pairs, ids, self.layers, self.read, self.template.hash, self.batches])


def plan_extraction(
    model: Model,
    pairs: PairSet,
    *,
    layers: Layers | None = None,
    read: Read | None = None,
    template: Template | None = None,
    batch_size: int = 16,
) -> ExtractionPlan:
    """Tokenises and checks everything before the model is run; arguments and errors as in `extract`."""
    require_pairs("extract", pairs)
    batch_size = require_count("batch_size", batch_size)
    info, tokenizer, chosen = describe(model), tokenizer_of(model), template_for(model, template)
    kept = check_layers(model, range(info.n_layers) if layers is None else layers)
    short = all(len(text) <= 4 for pair in pairs for text in (pair.positive.strip(), pair.negative.strip()))
    read = ("answer" if short else "completion_mean") if read is None else read
    if not (read in ("answer", "completion_mean", "last") or (isinstance(read, int) and not isinstance(read, bool))):
        raise InputError(f"read={read!r}: allowed are 'answer', 'completion_mean', 'last', or an integer position.")
    encoded = tuple(chosen.encode_pair(tokenizer, pair) for pair in pairs)
    for pair, both in zip(pairs, encoded, strict=True):
        for side in (both.positive, both.negative):
            info.require_room(pair.where, len(side.ids))
            if isinstance(read, int) and not -len(side.ids) <= read < len(side.ids):
                raise InputError(f"{pair.where}: read={read} lies outside its {len(side.ids)} tokens.")
    # Pairs of like length share a batch: less padding, and the same sums in whatever order the pairs came. The longest come first:
    # what does not fit fails at once, and later batches find room where longer ones were.
    order = sorted(
        range(len(pairs)), key=lambda i: (len(encoded[i].positive.ids), encoded[i].positive.ids), reverse=True
    )
    batches = tuple(tuple(order[start : start + batch_size]) for start in range(0, len(order), batch_size))
    return ExtractionPlan(pairs, encoded, tuple(kept), read, chosen, info, weight_basis(model), batches)


def positions_read(read: Read, pair: EncodedPair, side: Prompt) -> range:
    """The token indices whose mean is read, of one side."""
    if read == "completion_mean":
        return range(side.completion_start, len(side.ids))
    position = pair.answer if read == "answer" else (-1 if read == "last" else read) % len(side.ids)
    return range(position, position + 1)
