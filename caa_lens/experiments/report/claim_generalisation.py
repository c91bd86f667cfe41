"""Claim 10: vectors on other forms of their behaviour, and on other behaviours."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from caa_lens.choices import as_free_text, restyle
from caa_lens.errors import InputError
from caa_lens.experiments.generalisation import transfer
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.section import Section
from caa_lens.experiments.report.status import Status, of_interval, together
from caa_lens.files import digest
from caa_lens.pairs import PairSet


def generalises(lab: Lab) -> Section:
    """Every behaviour's vector on every behaviour's pairs, and on its own pairs written otherwise."""
    study = lab.study
    vectors = dict(lab.several(2, "generalisation"))
    tests = {name: lab.pairs(name).report for name in vectors}
    for name, pairs in list(tests.items()):
        tests |= _other_forms(name, pairs)
    # Some of the authors' questions stand in training and test sets, with other options; as free text they are the same.
    seen = {digest for group in vectors.values() for digest in group.provenance.prompt_digests}
    unseen = {name: [pair for pair in pairs if pair.digests.isdisjoint(seen)] for name, pairs in tests.items()}
    tests = {name: replace(tests[name], pairs=tuple(pairs)) for name, pairs in unseen.items() if pairs}
    first = next(iter(vectors))
    result = transfer(
        lab.model,
        vectors,
        tests,
        layer=lab.layer(first),
        controls=1,
        batch_size=study.batch_size,
        seed=study.seed,
        store=lab.work("generalisation", digest(list(vectors))[:12]),  # of these behaviours only
        progress=lab.progress,
    )
    table = result.to_pandas()
    of = list(zip(table["source"], table["test"], strict=True))
    forms = table[[_is_form(test, source) for source, test in of]]
    status = "described" if forms.empty else on_forms(forms)
    notes = (
        f"All at layer {lab.layer(first)}, chosen on {first}. The status is of each vector on other forms of its own behaviour.",
    )
    # The table has every pair; said in words are a vector's own behaviour, and other forms of it.
    said = list(zip(of, result.verdict().splitlines(), strict=True))
    own = [
        line
        for name in vectors
        for (source, test), line in said
        if source == name and (test == name or _is_form(test, name))
    ]
    return Section(status, "\n".join(own), {"transfer": table}, {"transfer": result.plot()}, notes=notes)


def on_forms(table: pd.DataFrame) -> Status:
    """The status of a vector's effects on other forms of its behaviour, each beside its controls."""
    return together(of_interval(row.effect_low, row.effect_high, row.control_effect) for row in table.itertuples())


def _is_form(test: str, behaviour: str) -> bool:
    return test.startswith(f"{behaviour}, ")


def _other_forms(name: str, pairs: PairSet) -> dict[str, PairSet]:
    """Lettered pairs with numbers for letters, with the options in the other order, and as free text."""
    if not name.startswith("ab/"):
        return {}
    try:
        return {
            f"{name}, numbered": restyle(pairs, letters="1"),
            f"{name}, swapped": restyle(pairs, order="swapped"),
            f"{name}, free text": as_free_text(pairs),
        }
    except InputError:  # questions whose options cannot be told apart
        return {}
