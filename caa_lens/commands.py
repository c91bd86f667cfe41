"""What each command of the command line does: a thin layer over one function of the package, and its tables."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import caa_lens as caa
from caa_lens.experiments.report import estimate, memory, study_of, write_page, write_published
from caa_lens.experiments.report import reproduce as run_study
from caa_lens.experiments.store import table_path
from caa_lens.token_text import number
from caa_lens.workers import is_main

console = Console(highlight=False)


def _load(arguments: Any) -> Any:
    started = time.perf_counter()
    model = caa.load_model(
        arguments.model,
        kind=arguments.kind,
        dtype=arguments.dtype,
        device=arguments.device,
        quantization=arguments.quantization,
        n_devices=arguments.n_devices,
    )
    console.print(f"loaded {arguments.model} as {type(model).__name__} in {time.perf_counter() - started:.0f} s")
    return model


def _split(arguments: Any) -> tuple[caa.PairSet, caa.PairSet]:
    return caa.load_pairs(arguments.pairs).split(held_out=arguments.held_out, seed=arguments.seed)


def extract(arguments: Any) -> None:
    train, held_out = _split(arguments)
    read = arguments.read
    if read is not None and read.lstrip("-").isdigit():
        read = int(read)
    model = _load(arguments)
    vectors = caa.extract(model, train, layers=arguments.layers, read=read, store=arguments.store)
    if is_main():
        vectors.save(arguments.out)
    console.print(_norm_table(vectors))
    console.print(f"{len(train)} pairs ({len(held_out)} held out, seed {arguments.seed}) -> {arguments.out}")


def generate(arguments: Any) -> None:
    vectors = caa.load_vectors(arguments.vectors)
    v = vectors[arguments.layer]
    model = _load(arguments)
    answers = _answers(
        model,
        v,
        arguments.prompts,
        arguments.multipliers,
        positions=arguments.positions,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    console.print(_answer_table(arguments.prompts, answers))


def project(arguments: Any) -> None:
    vectors = caa.load_vectors(arguments.vectors)
    v = vectors[vectors.layers[(len(vectors) - 1) // 2] if arguments.layer is None else arguments.layer]
    model = _load(arguments)
    projection = caa.project(
        model,
        v,
        arguments.text,
        measure=arguments.measure,
        steering=arguments.multiplier * v if arguments.multiplier else None,
        positions=arguments.positions,
        max_new_tokens=arguments.generate,
        template=caa.Plain() if arguments.plain else None,
    )
    assert isinstance(projection, caa.Projection)
    projection.show()
    for name, order in (("highest", -projection.values), ("lowest", projection.values)):
        tokens = ((projection.tokens[i], float(projection.values[i])) for i in order.argsort()[:5].tolist())
        console.print(f"{name}: " + ", ".join(f"{token!r} {number(value)}" for token, value in tokens), markup=False)
    if arguments.html and is_main():
        projection.save_html(arguments.html)
        console.print(f"-> {arguments.html}")


def convert(arguments: Any) -> None:
    vectors = caa.load_vectors(
        arguments.source,
        format=arguments.source_format,
        model=arguments.model,
        n_layers=arguments.n_layers,
        layer=arguments.layer,
        shift=arguments.shift,
        behaviour=arguments.behaviour,
        feature=arguments.feature,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", caa.CaaLensWarning)
        vectors.save(arguments.target, format=arguments.target_format)
    for warning in caught:
        console.print(f"note: {warning.message}", markup=False)
    console.print(f"{vectors!r} -> {arguments.target}", markup=False)


def score(arguments: Any) -> None:
    _, held_out = _split(arguments)
    _measure(arguments, held_out, layers=[arguments.layer], controls=True)


def sweep(arguments: Any) -> None:
    _, held_out = _split(arguments)
    _measure(arguments, held_out, layers=arguments.layers, controls=arguments.controls)


def _measure(arguments: Any, held_out: caa.PairSet, *, layers: Sequence[int] | None, controls: bool) -> None:
    if arguments.save:
        table_path(arguments.save)  # refused before the run, not behind it
    vectors = caa.load_vectors(arguments.vectors)
    systems = held_out.system_prompts if arguments.systems else None
    others = {name: caa.load_vectors(file) for name, file in arguments.others}
    model = _load(arguments)
    result = caa.sweep(
        model,
        vectors,
        held_out,
        layers=layers,
        multipliers=arguments.multipliers,
        metric=arguments.metric,
        controls=controls,
        others=others,
        systems=systems,
        positions=arguments.positions,
        seed=arguments.seed,
        store=arguments.store,
    )
    console.print(_score_table(result))
    if len(set(arguments.multipliers)) > 1:
        console.print(result.verdict())
    if arguments.save and is_main():
        result.save(arguments.save)


def demo(arguments: Any) -> None:
    pairs = caa.load_pairs(arguments.pairs)
    train, held_out = _split(arguments)
    model = _load(arguments)
    vectors = caa.extract(model, train)
    path = arguments.out / f"{pairs.name.replace('/', '-')}.safetensors"
    if is_main():
        vectors.save(path)
    console.print(_norm_table(vectors))
    layer = vectors[len(vectors) // 2 - 1 if arguments.layer is None else arguments.layer].layer
    console.print(f"\nHeld-out contrast at layer {layer}, beside directions of the same norm:")
    one_each = caa.VectorSet([vectors[layer]], {"shuffled-0": vectors.controls["shuffled-0"]})
    test = held_out[:DEMO_ITEMS]
    result = caa.sweep(model, one_each, test, multipliers=(-1, -0.5, 0, 0.5, 1), controls=1, seed=arguments.seed)
    console.print(_score_table(result))
    console.print(result.verdict())
    prompts = list(pairs.open_prompts[:DEMO_PROMPTS]) or [pair.prompt for pair in held_out[:DEMO_PROMPTS]]
    with console.status("generating"):
        answers = _answers(model, vectors[layer], prompts, (-1.0, 0.0, 1.0), max_new_tokens=DEMO_TOKENS)
    console.print(f"\nGreedy answers, {DEMO_TOKENS} tokens, steered at layer {layer}:")
    console.print(_answer_table(prompts, answers))
    console.print(
        f"saved {path}. Try next:\n"
        f'  caa-lens generate "{prompts[0]}" --vectors {path} --layer {layer} --multipliers -1 1 3\n'
        f"  caa-lens sweep --pairs {pairs.name} --vectors {path}\n"
        "  caa-lens demo --pairs sentiment"
    )


def reproduce(arguments: Any) -> None:
    changed = {name: getattr(arguments, name) for name in STUDY_OPTIONS}
    study = study_of(arguments.study, arguments.model, **changed)
    arguments.model, arguments.dtype = study.model, study.dtype
    arguments.kind, arguments.device, arguments.quantization = study.kind, study.device, study.quantization
    model = _load(arguments)
    console.print(_estimate_table(estimate(study, arguments.out, model), memory(study, model)))
    if not arguments.estimate:
        page = run_study(study, arguments.out, model=model, say=console.print)
        console.print(f"-> {page}")


STUDY_OPTIONS = (
    "behaviours", "claims", "kind", "dtype", "device", "quantization", "data", "published", "judge", "layer", "base", "finetune"
)  # fmt: skip


def report(arguments: Any) -> None:
    if arguments.published:
        for file in write_published(arguments.published, arguments.out):
            console.print(f"-> {file}")
    else:
        console.print(f"-> {write_page(arguments.out)}")


def _estimate_table(costs: pd.DataFrame, peak: float) -> Table:
    table = Table(
        title=f"estimate: {costs['minutes'].sum():.0f} minutes, {peak / 2**30:.1f} GiB of memory; a rough figure"
    )
    for heading in ("claim", "tokens (thousands)", "minutes"):
        table.add_column(heading, justify="right")
    for row in costs.itertuples():
        table.add_row(str(row.claim), f"{row.thousand_tokens:.0f}", f"{row.minutes:.1f}")
    return table


DEMO_ITEMS, DEMO_PROMPTS, DEMO_TOKENS = 12, 3, 28
"""Sizes of the demo: as many as finish within a minute and a half on two processor cores."""


def _answers(
    model: Any,
    v: caa.SteeringVector,
    prompts: Sequence[str],
    multipliers: Sequence[float],
    *,
    positions: Any = "after_instruction",
    **options: Any,
) -> dict[float, list[str]]:
    """Answers of each prompt at each multiplier, all in one batch: every row has its own strength."""
    rows = [prompt for _ in multipliers for prompt in prompts]
    strength = torch.tensor(multipliers).repeat_interleave(len(prompts))
    with caa.steer(model, v, positions=positions, strength=strength):
        texts = list(caa.generate(model, rows, batch_size=len(rows), **options))
    return {m: texts[k * len(prompts) : (k + 1) * len(prompts)] for k, m in enumerate(multipliers)}


def _norm_table(vectors: caa.VectorSet) -> Table:
    table = Table(title=f"{vectors.provenance.expression}: norms by layer")
    for heading in ("layer", "|v|", "|residual|", "|v| / |residual|"):
        table.add_column(heading, justify="right")
    for v in vectors.values():
        table.add_row(str(v.layer), f"{v.norm:.2f}", f"{v.residual_norm or 0:.1f}", f"{v.relative_norm or 0:.3f}")
    return table


def _score_table(result: caa.SweepResult) -> Table:
    """One row a system prompt, vector and layer, one column a multiplier: the mean, and below it the 95% interval."""
    summary = result.to_pandas()
    multipliers = sorted(summary["multiplier"].unique())
    layers = summary["layer"].unique()
    where = f"layer {layers[0]}, " if len(layers) == 1 else ""
    title = f"{where}{result.metric.name} in {result.metric.unit}, mean and 95% interval, n = {summary['n'].iloc[0]}"
    table = Table(title=title, show_lines=True)
    table.add_column("vector", no_wrap=True)
    for multiplier in multipliers:
        table.add_column(_signed(multiplier), justify="center", no_wrap=True)
    axes = [axis for axis in ("system", "vector", "layer") if axis in summary]
    for place, group in summary.groupby(axes, sort=False):
        *names, layer = place
        cells = []
        for _, row in group.sort_values("multiplier").iterrows():
            mass = f"\nmass {row['mass']:.2f}" if "mass" in row else ""
            cells.append(f"{row['value']:+.2f}\n{row['low']:.2f} {row['high']:.2f}{mass}")
        table.add_row(": ".join(names) + ("" if where else f" @ {layer}"), *cells)
    return table


def _signed(multiplier: float) -> str:
    return f"{multiplier:+g}" if multiplier else "0"


def _answer_table(prompts: Sequence[str], answers: dict[float, list[str]]) -> Table:
    table = Table(show_lines=True)
    table.add_column("prompt", ratio=1)
    for multiplier in answers:
        table.add_column(_signed(multiplier), ratio=2)
    for row, prompt in enumerate(prompts):
        # As plain text: an answer may hold square brackets, which are markup otherwise.
        table.add_row(Text(prompt), *(Text(texts[row]) for texts in answers.values()))
    return table
