"""Claims 7 and 9: what the vector reads on each token, and what it does to the streams on the way to the logits."""

from __future__ import annotations

import numpy as np
import pandas as pd

from caa_lens.experiments.controls import norm_matched
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.section import Section
from caa_lens.experiments.report.status import of_interval
from caa_lens.experiments.statistics import Estimate, bootstrap_mean
from caa_lens.logits import logit_attribution, logit_lens
from caa_lens.pairs import PairSet
from caa_lens.projected import Projection
from caa_lens.projection import project
from caa_lens.steering import steer
from caa_lens.token_text import fragment
from caa_lens.vector import SteeringVector

SHOWN = 2
"""Pairs whose tokens are shown in colour."""


def per_token(lab: Lab, behaviour: str) -> Section:
    """Projections of every token: on the sides of held-out pairs, beside the same with a shuffled-label vector."""
    v, pairs = lab.vector(behaviour), lab.pairs(behaviour).report
    difference = _difference(lab, v, pairs)
    control = _difference(lab, norm_matched(v.controls["shuffled-0"], v), pairs)
    status = of_interval(difference.low, difference.high, control.value)
    words = (
        f"Over the answer's tokens of {difference.n} held-out pairs, the positive side lies {difference.value:+.3f} "
        f"[{difference.low:+.3f}, {difference.high:+.3f}] further along the vector than the negative one, in units of it; a "
        f"vector of shuffled labels and the same norm gives {control.value:+.3f} [{control.low:+.3f}, {control.high:+.3f}]."
    )
    shown = _sides(lab, v, pairs[:SHOWN])
    names = [f"{side} side of pair {number + 1}" for number in range(SHOWN) for side in ("positive", "negative")]
    coloured = {name: fragment(projection.lines()) for name, projection in zip(names, shown, strict=True)}
    heat = project(
        lab.model,
        lab.vectors(behaviour),
        [_conversation(pairs[0].prompt, pairs[0].positive)],
        measure="component",
        progress=False,
    )
    assert isinstance(heat, list)
    table = pd.DataFrame([{"vector": "vector", **difference._asdict()}, {"vector": "shuffled-0", **control._asdict()}])
    return Section(status, words, {"projection_differences": table}, {"projection_by_layer": heat[0].plot()}, coloured)


def _conversation(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _sides(lab: Lab, v: SteeringVector, pairs: PairSet) -> list[Projection]:
    """Positive and negative side of each pair, in turn."""
    texts = [_conversation(pair.prompt, answer) for pair in pairs for answer in (pair.positive, pair.negative)]
    found = project(lab.model, v, texts, measure="component", batch_size=lab.study.batch_size, progress=lab.progress)
    assert isinstance(found, list)
    return found


def _difference(lab: Lab, v: SteeringVector, pairs: PairSet) -> Estimate:
    """Mean over pairs of the answer tokens' mean component, positive minus negative."""

    def answer(projection: Projection) -> float:
        assert projection.instruction_end is not None
        return float(projection.values[projection.instruction_end + 1 :].mean())

    means = np.array([answer(projection) for projection in _sides(lab, v, pairs)])
    return bootstrap_mean(means[0::2] - means[1::2], seed=lab.study.seed)


def lens(lab: Lab, behaviour: str) -> Section:
    """The likeliest next token by layer with and without steering, and the tokens that the vector itself makes likelier."""
    model, v, question = lab.model, lab.vector(behaviour), lab.prompts(behaviour, 1)[0]
    direct = logit_attribution(model, v, question).top_tokens(8)
    rows, figures = [], {}
    for multiplier in (-1.0, 0.0, 1.0):
        with steer(model, multiplier * v):
            found = logit_lens(model, question, positions=slice(-1, None), top=3)
        rows.append(found.to_pandas().assign(multiplier=multiplier))
        figures[f"lens_at_{multiplier:+g}"] = found.plot()
    table = pd.concat(rows, ignore_index=True)
    last = lab.n_layers() - 1
    final = table[(table["layer"] == last) & (table["rank"] == 1)].set_index("multiplier")
    said = "; ".join(f"{m:+g}: {final.loc[m, 'predicted']!r} ({final.loc[m, 'probability']:.2f})" for m in final.index)
    pushed = ", ".join(repr(token) for token in direct["token"][:6])
    steered = table[(table["rank"] == 1) & (table["multiplier"] != 0)]
    plain = table[(table["rank"] == 1) & (table["multiplier"] == 0)].set_index("layer")["predicted"]
    changed = sorted({row.layer for row in steered.itertuples() if row.predicted != plain[row.layer]})
    words = (
        f"After {question!r} the likeliest first token is, by multiplier, {said}.\n"
        f"Steering at layer {v.layer} changes the lens's likeliest token at {len(changed)} of {len(plain)} layers"
        f"{f', first at layer {changed[0]}' if changed else ''}.\n"
        f"The vector itself, read through the unembedding, favours {pushed}."
    )
    notes = ("A lens reads intermediate streams as if they were the last; early layers often use another basis.",)
    return Section("described", words, {"lens": table, "direct_effect": direct}, figures, notes=notes)
