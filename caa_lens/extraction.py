"""Contrastive vectors from a model: every layer in one pass, the shared prefix once, memory independent of the pairs.

    v_l = mean over pairs of (resid_post_l[positive] - resid_post_l[negative]) at the position read

The two completions of a pair share their prompt, and all prompts share the template's beginning. What is shared is run once
and continued from its KV cache, which is exact; only the tokens that differ are run per pair and per side. Sums are kept in fp64.
Several processes share the batches, and add up the same sums in the same order as one (`workers`).

Source: Rimsky et al., arXiv:2312.06681, section 3. `read="answer"` is their reading (the answer letter's token).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.activations import PairActivations, open_store, read_shard, write_shard
from caa_lens.arguments import Layers
from caa_lens.chunks import Chunks
from caa_lens.directions import Moments, control_weights
from caa_lens.extraction_plan import ExtractionPlan, Read, plan_extraction, positions_read
from caa_lens.files import digest
from caa_lens.models import (
    Model,
    capture_hooks,
    device_of,
    has_hooks,
    hooks,
    model_state,
    pad,
    run,
)
from caa_lens.pairs import PairSet
from caa_lens.positions import is_steered, known_prompts
from caa_lens.prefixes import PrefixRunner, common_head
from caa_lens.prompts import Prompt, Template
from caa_lens.provenance import Provenance
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet
from caa_lens.workers import is_main, on_main, require_same, shared_map


def extract(
    model: Model,
    pairs: PairSet,
    *,
    layers: Layers | None = None,
    read: Read | None = None,
    template: Template | None = None,
    batch_size: int = 16,
    share_prefix: bool = True,
    store: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> VectorSet:
    """Mean differences of the residual stream between the two sides of contrast pairs, at every layer.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, with raw or processed weights.
        pairs: the training pairs.
        layers: which layers (0-based; negative from the end); all by default.
        read: where the activation is read: `"answer"`, the first token at which a pair's completions differ (the paper's
            reading); `"completion_mean"`, the mean over the completion's tokens; `"last"`, the completion's last token; or an
            integer index into the tokens of the whole text, usually negative. By default `"answer"` for completions of up
            to four characters, such as `(A)`, else `"completion_mean"`.
        template: how prompts are written; the model's default otherwise.
        batch_size: pairs run together; it changes the speed only.
        share_prefix: run what pairs have in common once. False runs every text whole, which is slower and equal. With hooks of
            yours on the model, every text is run whole and by itself, so that they act as in a pass of your own.
        store: a folder for the activations themselves, as safetensors shards (`load_activations` reads them). If it
            holds shards of an interrupted run of the same extraction, they are not computed again.
        progress: show a progress bar.

    Returns:
        A `VectorSet` with the vectors, the mean residual norms and their history; its `.controls` are made of the same
        activations: three vectors of shuffled labels, and for multiple-choice pairs the letter's own and the balanced one.

    Raises:
        InputError: no pairs, a pair longer than the context, completions that tokenise alike, a position outside the
            text, or a store of another extraction; before the model is run.
        MissingError: a layer out of range.
    """
    plan = plan_extraction(model, pairs, layers=layers, read=read, template=template, batch_size=batch_size)
    weights = control_weights([pair.key for pair in pairs])
    table = torch.stack(list(weights.values())) if weights else torch.zeros(0, len(pairs))
    moments = Moments.zeros(len(plan.layers), plan.info.d_model, len(table))
    for batch in iterate_activations(model, plan, share_prefix=share_prefix, store=store, progress=progress):
        moments.update(batch.positive, batch.negative, table[:, list(batch.index)])
    return _to_vectors(moments, plan, tuple(weights))


def iterate_activations(
    model: Model,
    plan: ExtractionPlan,
    *,
    share_prefix: bool = True,
    store: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Iterator[PairActivations]:
    """Yields the activations of a plan batch by batch; what a store already holds is read, the rest is run and stored.

    Every process yields all of them. A store of several machines has to be in a folder that all of them see.
    """
    what = f"extract {plan.pairs.name}"
    require_same(plan.signature, what)
    folder = _opened(Path(store), model, plan) if store is not None else None
    # Neither a surrounding steer() nor a user's own hooks find their positions in cached pieces of a text; the latter not in a
    # padded batch either.
    whole = has_hooks(model)
    reader = _Reader(model, plan, share_prefix and not whole, alone=whole and not is_steered(model))
    with (
        hooks(model, capture_hooks(plan.layers, reader.capture)),
        tqdm(total=len(plan.pairs), desc=what, unit="pair", disable=not (progress and is_main())) as bar,
    ):

        def activations(number: int) -> PairActivations:
            shard = folder / f"shard-{number:05d}.safetensors" if folder else None
            if shard is not None and shard.exists():
                return read_shard(shard)
            batch = reader.read(plan.batches[number])
            if shard is not None:
                write_shard(shard, batch)
            return batch

        for batch in shared_map(activations, range(len(plan.batches))):
            yield batch
            bar.update(len(batch.index))


def _opened(store: Path, model: Model, plan: ExtractionPlan) -> Path:
    """The store of a plan for the model as it is now."""
    signature = digest([plan.signature, model_state(model)])
    require_same(signature, f"extract {plan.pairs.name}")
    return on_main(lambda: open_store(store, signature, _about(plan)))


def _about(plan: ExtractionPlan) -> dict[str, Any]:
    return {
        "behaviour": plan.pairs.name,
        "model": plan.info.name,
        "layers": plan.layers,
        "read": plan.read,
        "n_pairs": len(plan.pairs),
        "n_shards": len(plan.batches),
    }


class _Reader:
    """Runs batches of pairs and collects `resid_post` at the positions read."""

    def __init__(self, model: Model, plan: ExtractionPlan, share_prefix: bool, *, alone: bool) -> None:
        self.model, self.plan, self.device, self.alone = model, plan, device_of(model), alone
        self.stop = plan.layers[-1] + 1
        sides = [side.ids for pair in plan.encoded for side in (pair.positive, pair.negative)]
        self.spans = [
            [positions_read(plan.read, pair, side) for side in (pair.positive, pair.negative)] for pair in plan.encoded
        ]
        first_read = min(span.start for both in self.spans for span in both)
        self.prefixes = PrefixRunner(model, common_head(sides, limit=first_read)) if share_prefix else None
        self.pairs_together = Chunks(len(plan.batches[0]))
        self.weights: Tensor | None = None  # [row, pos]: what each column counts for in the row's reading
        self.found: dict[int, Tensor] = {}

    def capture(self, layer: int, activations: Tensor) -> None:
        if self.weights is not None:
            weights = self.weights.to(activations.device)
            self.found[layer] = torch.einsum("rp,rpd->rd", weights, activations.float()).cpu()

    def read(self, index: Sequence[int]) -> PairActivations:
        """The activations of a batch of pairs; fewer are run together where memory does not suffice."""
        read = torch.stack(self.pairs_together.map(self._sides, index, size=1))
        return PairActivations(tuple(index), read[:, 0].contiguous(), read[:, 1].contiguous())

    @torch.no_grad()
    def _sides(self, index: Sequence[int]) -> list[Float[Tensor, "side layer d_model"]]:
        pairs, read = [self.plan.encoded[i] for i in index], [self.spans[i] for i in index]
        # All positive sides, then all negative ones: two copies of the pairs' prefixes.
        sides = [pair.positive for pair in pairs] + [pair.negative for pair in pairs]
        spans = [spans[0] for spans in read] + [spans[1] for spans in read]
        if self.alone:
            found = torch.cat([self._run([side], [span], [0]) for side, span in zip(sides, spans, strict=True)])
        else:
            # Where the sides of a pair have nothing in common any more, or are read.
            starts = [min(pair.answer, *(span.start for span in both)) for pair, both in zip(pairs, read, strict=True)]
            found = self._run(sides, spans, starts if self.prefixes is not None else [0] * len(pairs))
        return list(torch.stack(found.split(len(pairs)), 1))

    def _run(
        self, sides: Sequence[Prompt], spans: Sequence[range], starts: Sequence[int]
    ) -> Float[Tensor, "side layer d_model"]:
        """The readings of texts that are run together; side i begins behind the cached tokens before start `i mod len(starts)`."""
        with known_prompts([side.instruction_end for side in sides]):
            past = None
            if self.prefixes is not None:
                past = self.prefixes.run([side.ids[:start] for side, start in zip(sides, starts, strict=False)])
            starts = [*starts] * (len(sides) // len(starts))
            stops = [len(side.ids) if self.alone else span.stop for side, span in zip(sides, spans, strict=True)]
            rows = [side.ids[start:stop] for side, start, stop in zip(sides, starts, stops, strict=True)]
            tokens, mask = pad(rows, side="right", device=self.device)
            self.weights = torch.zeros(mask.shape)
            for row, (span, start) in enumerate(zip(spans, starts, strict=True)):
                self.weights[row, span.start - start : span.stop - start] = 1 / len(span)
            try:
                run(self.model, tokens, mask, past=past, stop_at_layer=self.stop)
            finally:
                self.weights = None
        return torch.stack([self.found.pop(layer) for layer in self.plan.layers], 1)


def _to_vectors(moments: Moments, plan: ExtractionPlan, control_names: Sequence[str]) -> VectorSet:
    provenance = Provenance(
        model=plan.info.name,
        revision=plan.info.revision,
        n_layers=plan.info.n_layers,
        d_model=plan.info.d_model,
        basis=plan.basis,
        expression=plan.pairs.name,
        n_pairs=len(plan.pairs),
        pairs_hash=plan.pairs.hash,
        prompt_digests=plan.pairs.prompt_digests,
        template=repr(plan.template),
        template_hash=plan.template.hash,
        read=str(plan.read),
        versions={name: version(name) for name in ("caa-lens", "transformer-lens", "transformers", "torch")},
    )
    norms = moments.mean_residual_norm.tolist()

    def vectors(directions: Tensor, expression: str, raw: bool) -> VectorSet:
        made = Provenance(**{**vars(provenance), "expression": expression})
        return VectorSet(
            [
                SteeringVector(
                    direction,
                    layer,
                    made,
                    residual_norm=norm,
                    raw_norm=float(direction.norm()) if raw else None,
                )
                for direction, layer, norm in zip(directions, plan.layers, norms, strict=True)
            ]
        )

    controls = {
        name: vectors(row, f"{plan.pairs.name}, {name}", raw=False)
        for name, row in zip(control_names, moments.mean_controls, strict=True)
    }
    result = vectors(moments.mean_difference, plan.pairs.name, raw=True)
    return VectorSet(list(result.values()), controls)
