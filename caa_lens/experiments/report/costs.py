"""What the parts of a study run, counted in tokens of a plain forward pass through all blocks.

    sweep     items x sides x (prompt + settings x steered tokens x share of the blocks above the layer)
    training  epochs x texts x tokens x passes x padding,  of LoRA 3 passes: forward, and back through activations and adapters

Very rough: lengths are those of a few training pairs, batches count as full, answers as long as allowed, half of the blocks lie
above a layer, and a decoded token counts as several. Believe the order of magnitude, and the shares of the claims a little more.
"""

from __future__ import annotations

from dataclasses import dataclass

from caa_lens.experiments.report.study import Study

ABOVE = 0.5
"""Share of the blocks that a branch runs."""
DECODED = 4.0
"""Tokens of a batched pass that a decoded one is worth."""
PASSES = {"lora": 3.0, "full": 4.0}
"""Forward passes that a training step is worth; of all weights with their gradients and the optimizer's step."""
PADDED = 1.3
"""What texts of unlike length in a batch add."""
WAYS, SYSTEMS = 5, 3
"""Ways of prompting of claim 4, system prompts of claim 2."""
STATEMENTS, STATEMENT, RUBRIC = 8, 10, 40
"""Statements that the local judge reads, their tokens, and those around an answer that is judged."""
QUESTION, PROSE, FREE = 60, 500, 15
"""Tokens of a two-choice question, of the text whose loss is measured, and of an option as free text."""


@dataclass(frozen=True)
class Pieces:
    """Sizes of a behaviour's pairs: mean tokens of prompts and answers, numbers of pairs."""

    prompt: float
    answer: float
    train: int
    choose: int
    report: int
    lettered: bool

    @property
    def text(self) -> float:
        """Tokens of a prompt with its answer."""
        return self.prompt + self.answer

    @property
    def pair(self) -> float:
        """Tokens of a pair whose prompt is run once."""
        return self.prompt + 2 * self.answer

    def sweep(self, items: int, branches: float) -> float:
        """A sweep of so many settings."""
        sides, steered = (1, 3.0) if self.lettered else (2, self.answer + 2)
        return items * sides * (self.prompt + branches * steered * ABOVE)

    def free_text(self, items: int, branches: float) -> float:
        """The same of lettered pairs as free text."""
        return items * 2 * (self.prompt + branches * (FREE + 2) * ABOVE)


def carried(study: Study, pieces: Pieces) -> int:
    """Controls that a vector brings along: of shuffled labels, and the two of letters."""
    return study.shuffles + (2 if pieces.lettered else 0)


def shared(study: Study, pieces: Pieces, n_layers: int) -> dict[str, float]:
    """What several claims rest on, by name."""
    swept = len(range(0, n_layers, study.layer_step))
    beside = 1 + study.controls + carried(study, pieces)
    nonzero = len(study.multipliers) - 1
    return {
        "vectors": pieces.train * pieces.pair,
        "layer": pieces.sweep(pieces.choose, swept * 2 * beside),
        "dose": SYSTEMS * pieces.sweep(pieces.report, nonzero * beside + 1),
    }


def needs(study: Study, claim: int, behaviour: str) -> tuple[str, ...]:
    """What of `shared` a claim needs of a behaviour."""
    first = behaviour == study.behaviours[0]
    if claim == 8 and not first:
        return ()
    if claim == 10 and not first:  # all vectors, at the first one's layer
        return ("vectors",)
    own = ("vectors", "layer") if study.layer is None or claim == 1 else ("vectors",)
    return (*own, "dose") if claim in (1, 2, 4, 6) else own


def own(study: Study, claim: int, behaviour: str, of: dict[str, Pieces], n_layers: int) -> float:
    """What a claim runs for a behaviour beside what is shared."""
    pieces = of[behaviour]
    swept = len(range(0, n_layers, study.layer_step))
    if claim == 2 and study.published_score and pieces.lettered:
        return pieces.sweep(pieces.report, len(study.multipliers))
    if claim == 3:
        return _answers(study, pieces)
    if claim == 4:
        return WAYS * pieces.sweep(pieces.report, 3) + (_tuning(study, pieces) if behaviour in study.finetune else 0.0)
    if claim == 5:
        branches = 1 + 2 * (2 + carried(study, pieces))
        asked = study.capability or (1400 if study.data else 48)
        return asked * (QUESTION + branches * 3 * ABOVE) + PROSE * branches * ABOVE
    if claim == 6:
        return pieces.sweep(pieces.report, swept * 2) + pieces.report * pieces.pair
    if claim == 7:
        return 4 * pieces.report * pieces.text
    if claim == 8:
        return 6 * 3 * 4 * (pieces.prompt + 24 * DECODED) if behaviour == study.behaviours[0] else 0.0
    if claim == 9:
        return 6 * pieces.prompt
    return _transfer(study, pieces, of) if claim == 10 else 0.0


def _answers(study: Study, pieces: Pieces) -> float:
    """Answers at three multipliers and under two controls, and what a judge in this process reads of them and of known texts."""
    written = 7 * study.questions
    writing = written * (pieces.prompt + study.max_new_tokens * DECODED)
    if study.judge.startswith("openai:") or not written:
        return writing
    reading = pieces.prompt + RUBRIC + STATEMENTS * STATEMENT
    return writing + written * (reading + study.max_new_tokens) + 2 * pieces.report * (reading + pieces.answer)


def _tuning(study: Study, pieces: Pieces) -> float:
    """Tuning in both directions: training, every pair measured before and after, and the sweep of the base and of either model."""
    trained = study.epochs * pieces.train * pieces.text * PASSES[study.method] * PADDED
    measured = 2 * 2 * (pieces.train + pieces.report) * pieces.text
    return 2 * (trained + measured) + 3 * pieces.sweep(pieces.report, 3)


def _transfer(study: Study, pieces: Pieces, of: dict[str, Pieces]) -> float:
    """Every behaviour's vector, and what it carries, on this behaviour's pairs and their other forms."""
    branches = 1 + 2 * (len(of) + 1 + sum(carried(study, other) for other in of.values()))
    forms = 3 if pieces.lettered else 1
    free = pieces.free_text(pieces.report, branches) if pieces.lettered else 0.0
    return forms * pieces.sweep(pieces.report, branches) + free
