"""The claims of the paper and of what followed, in the order of the report, and which function examines each.

Source: Rimsky et al., arXiv:2312.06681; the post "Steering Llama-2 with contrastive activation additions" (2024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from caa_lens.experiments.report.claim_answers import judged_answers
from caa_lens.experiments.report.claim_baselines import fine_tuning, prompting_baselines
from caa_lens.experiments.report.claim_capability import capabilities
from caa_lens.experiments.report.claim_cost import zero_cost
from caa_lens.experiments.report.claim_effects import by_layer, by_multiplier
from caa_lens.experiments.report.claim_generalisation import generalises
from caa_lens.experiments.report.claim_geometry import between_behaviours, geometry
from caa_lens.experiments.report.claim_inside import lens, per_token
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.section import Section
from caa_lens.experiments.report.study import Study


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        number, title: as the report shows them.
        statement: what is claimed.
        holds: what must be found for the status `holds`; the report shows it as "Holds where ..."; empty if nothing is decided.
        each: examines it for one behaviour.
        all_together: examines it for all of them.
        concerns: whether a behaviour of a study is examined.
        of: the behaviours that the section of all together is made from.
    """

    number: int
    title: str
    statement: str
    holds: str
    each: Callable[[Lab, str], Section] | None = None
    all_together: Callable[[Lab], Section] | None = None
    concerns: Callable[[Study, str], bool] = lambda study, behaviour: True
    of: Callable[[Study], tuple[str, ...]] = lambda study: study.behaviours


CLAIMS = (
    Claim(
        1,
        "Effect by layer",
        "A vector moves the behaviour, most at layers in the middle of the model.",
        "the effect at the chosen layer lies above zero and beyond every control of the same norm, and of the layers swept one in "
        "the middle half has the largest effect, as measured.",
        by_layer,
    ),
    Claim(
        2,
        "Effect by multiplier",
        "The effect grows with the multiplier, alone and on top of a positive or negative system prompt.",
        "the effect lies above zero and beyond every control of the same norm without and under each system prompt, and no step of "
        "the multiplier lowers the score. Whether vector and prompt add up exactly is described; it decides nothing.",
        by_multiplier,
    ),
    Claim(
        3,
        "Open-ended answers",
        "The vector changes what the model writes when it is asked an open question, as a judge sees it.",
        "the effect on the judged scores lies above zero and beyond every control of the same norm, and the judge tells the "
        "two sides of known pairs apart.",
        judged_answers,
        concerns=lambda study, behaviour: study.questions > 0,
    ),
    Claim(
        4,
        "Beside prompting and fine-tuning",
        "The vector works on top of few-shot examples, of system prompts and of fine-tuning on the same pairs.",
        "the effect lies above zero under every way of prompting (all together: tuning moves the held-out score its way, and the "
        "effect on top of it lies above zero), and the vector alone, on the model as it is, beyond every control of the same norm.",
        prompting_baselines,
        fine_tuning,
        of=lambda study: study.finetune,
    ),
    Claim(
        5,
        "Capability",
        "What the model knows, and how well it predicts text, is barely touched.",
        "no harm is compatible with the intervals, in any capability at either multiplier, that is larger than 5% of answers or "
        "0.1 nats per token.",
        capabilities,
    ),
    Claim(
        6,
        "Geometry",
        "Activations of the two sides separate; vectors of neighbouring layers, and of base and chat models, are alike; a vector "
        "works at other layers than its own.",
        "the effect of the chosen layer's vector lies above zero there and at most of the other layers tried, and at its own "
        "beyond every control of the same norm. Separation and cosines are described; they decide nothing.",
        geometry,
        between_behaviours,
    ),
    Claim(
        7,
        "Per-token projection",
        "Tokens that show the behaviour lie further along the vector.",
        "the difference of the two sides lies above zero and beyond that along a vector of shuffled labels of the same norm.",
        per_token,
    ),
    Claim(
        8,
        "No cost at inference",
        "A vector added at all positions is a bias: it can be baked into the weights and then costs nothing.",
        "the logits of the baked and of the hooked model are equal, to rounding. Seconds are described; they decide nothing.",
        all_together=zero_cost,
        of=lambda study: study.behaviours[:1],
    ),
    Claim(
        9,
        "Logit lens",
        "Steering changes what intermediate streams predict, from its layer on.",
        "",
        lens,
    ),
    Claim(
        10,
        "Generalisation",
        "A vector works on other forms of its behaviour: free text, other letters, options in the other order.",
        "on every other form of its own behaviour the effect lies above zero and beyond every control of the same norm.",
        all_together=generalises,
    ),
)
