"""Log-probabilities of chosen tokens for many texts under many steering settings, exactly and without repeated work.

    result[text][setting, target] = log p(token | text before it, steering)

No token before the first steered one depends on layer or multiplier. So the unsteered part of a text is run once, its KV cache is
shared, and every (layer, direction) is a branch that re-runs only the steered tokens, from its own layer up. Equal to running
every text whole under `steer` for every setting, which is what is done where a user's hooks are on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.chunks import Chunks
from caa_lens.directions import Operator, add
from caa_lens.models import Branch, Model, device_of, has_hooks, pad, run_branches
from caa_lens.positions import Positions, row_mask
from caa_lens.prefixes import PrefixRunner, common_head
from caa_lens.vector import SteeringVector
from caa_lens.workers import shared_map

BRANCH_TOKENS = 4096
"""Tokens of all branches that are in the model together, at first; halved when memory does not suffice."""


@dataclass(frozen=True)
class Text:
    """One tokenised text and the tokens whose log-probabilities are wanted.

    Attributes:
        ids: the whole text.
        instruction_end: index of the last token of its prompt.
        targets: (index of the position predicted, token ids asked for at it), positions ascending, at least 1.
    """

    ids: tuple[int, ...]
    instruction_end: int
    targets: tuple[tuple[int, tuple[int, ...]], ...]


def grid_logprobs(
    model: Model,
    texts: Sequence[Text],
    vectors: Sequence[SteeringVector | None],
    *,
    positions: Positions = "after_instruction",
    operator: Operator = add,
    strength: float = 1.0,
    batch_size: int = 16,
) -> Iterator[tuple[int, Float[Tensor, "setting target"]]]:
    """Yields (index of the text, log-probabilities), texts of like length together, each when it is done.

    Several processes share the batches of texts; each of them yields all results.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        texts: what to score; all their target tokens are flattened into one axis, in order.
        vectors: one setting each, already scaled; None is the unsteered model.
        positions, operator, strength: as in `steer`.
        batch_size: texts run together; memory is bounded by it and by `BRANCH_TOKENS`, both halved when it does not suffice;
            results do not depend on them.
    """
    runner = _Runner(model, texts, vectors, positions, operator, strength, batch_size)
    batch_size = 1 if runner.alone else batch_size
    order = sorted(range(len(texts)), key=runner.length)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for chosen, found in zip(batches, shared_map(runner.run, batches), strict=True):
        yield from zip(chosen, found, strict=True)


class _Runner:
    def __init__(
        self,
        model: Model,
        texts: Sequence[Text],
        vectors: Sequence[SteeringVector | None],
        positions: Positions,
        operator: Operator,
        strength: float,
        batch_size: int,
    ) -> None:
        self.model, self.texts, self.vectors, self.device = model, texts, vectors, device_of(model)
        self.positions, self.operator, self.strength = positions, operator, strength
        self.texts_together, self.branches_together = Chunks(batch_size), Chunks(BRANCH_TOKENS)
        self.alone = has_hooks(model)  # a user's hooks act as in a pass over the whole text, and no other
        self.starts = [self.first_steered(text) for text in texts]
        head = common_head([text.ids for text in texts], limit=min(self.starts)) if texts else ()
        self.prefixes = PrefixRunner(model, head)

    def length(self, index: int) -> tuple[int, int]:
        """Tokens of a text that every branch runs, and all of them: texts alike in both are run together."""
        text = self.texts[index]
        return text.targets[-1][0] - self.starts[index], len(text.ids)

    def steered(self, text: Text) -> Tensor:
        end = text.instruction_end
        return row_mask(self.positions, torch.tensor(text.ids), prompt_length=end + 1, instruction_end=end)

    def first_steered(self, text: Text) -> int:
        """Where the branches of a text begin: its first steered token, or earlier if an earlier prediction is wanted."""
        if self.alone:
            return 0
        on = self.steered(text).nonzero()
        first_read = text.targets[0][0] - 1
        return min(int(on[0]) if len(on) else first_read, first_read)

    def run(self, index: Sequence[int]) -> list[Tensor]:
        """Each text's log-probabilities; fewer texts together where memory does not suffice for one branch of them."""
        return self.texts_together.map(self._run, index, size=1)

    @torch.no_grad()
    def _run(self, index: Sequence[int]) -> list[Tensor]:
        texts, starts = [self.texts[i] for i in index], [self.starts[i] for i in index]
        past = self.prefixes.run([text.ids[:start] for text, start in zip(texts, starts, strict=True)])
        # The last target's own token is predicted, not run.
        rows = [
            text.ids[start : None if self.alone else text.targets[-1][0]]
            for text, start in zip(texts, starts, strict=True)
        ]
        tokens, mask = pad(rows, side="right", device=self.device)
        on = torch.zeros(mask.shape, dtype=torch.bool)
        for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
            on[row, : len(rows[row])] = self.steered(text)[start : start + len(rows[row])]
        at, readout = _reads(texts, starts, self.device)
        branches = [self._branch(vector, on.to(self.device)) for vector in self.vectors]

        def run_some(chunk: Sequence[Branch]) -> list[Tensor]:
            return run_branches(self.model, tokens, mask, chunk, readout, at=at, past=past)

        # One [text, target] tensor a branch.
        found = self.branches_together.map(run_some, branches, size=tokens.numel())
        counts = [sum(len(ids) for _, ids in text.targets) for text in texts]
        whole = torch.stack(found)
        return [whole[:, row, :count].clone() for row, count in enumerate(counts)]

    def _branch(self, vector: SteeringVector | None, on: Tensor) -> Branch:
        if vector is None or not bool(vector.tensor.any()):
            return Branch({})

        def change(activations: Tensor) -> Tensor:
            steered = self.operator(activations, vector.tensor.to(activations.device), self.strength)
            return torch.where(on.to(activations.device).unsqueeze(-1), steered, activations)

        return Branch({vector.layer: change})


def _reads(
    texts: Sequence[Text], starts: Sequence[int], device: torch.device
) -> tuple[Int[Tensor, "text read"], Callable[[Tensor], Tensor]]:
    """Where logits are wanted, and what makes log-probabilities of the targets, `[text, target]`, of them; padded with zeros."""
    columns = [
        [position - 1 - start for position, _ in text.targets] for text, start in zip(texts, starts, strict=True)
    ]
    asked = [[(read, token) for read, (_, ids) in enumerate(text.targets) for token in ids] for text in texts]
    at = _padded(columns, 0, device)
    reads, ids = _padded(asked, (0, 0), device).unbind(-1)
    row = torch.arange(len(texts), device=device).unsqueeze(1)

    def readout(logits: Tensor) -> Tensor:
        logits = logits.float()
        here = tuple(index.to(logits.device) for index in (row, reads, ids))
        return (logits[here] - logits.logsumexp(-1)[here[:2]]).cpu()

    return at, readout


def _padded(rows: Sequence[Sequence[Any]], filler: Any, device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=device)
