"""What the claims of a study share: the model, the pairs, the vectors, the chosen layers and the sweeps behind several claims.

Everything is made once, when it is first asked for, and kept below the study's folder, so that a study goes on where it was.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from caa_lens.errors import InputError, MissingError
from caa_lens.experiments.report.section import NotRun
from caa_lens.experiments.report.study import Study
from caa_lens.experiments.result import SweepResult
from caa_lens.experiments.sweep import sweep
from caa_lens.extraction import extract
from caa_lens.models import Model, describe, load_model
from caa_lens.pairs import PairSet
from caa_lens.sources import load_pairs
from caa_lens.storage import load_vectors
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet, normalize_across
from caa_lens.workers import on_main

Kept = TypeVar("Kept")


def once(make: Callable[[Lab, str], Kept]) -> Callable[[Lab, str], Kept]:
    """Keeps what a method of the lab makes for each behaviour."""

    @functools.wraps(make)
    def kept(lab: Lab, behaviour: str) -> Kept:
        key = (make.__name__, behaviour)
        if key not in lab.made:
            lab.made[key] = make(lab, behaviour)
        return lab.made[key]

    return kept


@dataclass(frozen=True)
class Pairs:
    """The pairs of a behaviour: to make the vector of, to choose its layer on, and to report it on."""

    train: PairSet
    choose: PairSet
    report: PairSet


class Lab:
    """A study at work.

    Args:
        study: its settings.
        folder: where it keeps what it has made.
        model: one that is already loaded; by default the study's is loaded when it is needed.
        progress: show progress bars.
    """

    def __init__(self, study: Study, folder: Path, *, model: Model | None = None, progress: bool = True) -> None:
        self.study, self.folder, self.progress = study, folder, progress
        self.made: dict[Any, Any] = {}
        if model is not None:
            self.model = model

    @cached_property
    def model(self) -> Model:
        """The study's model."""
        return self.load(self.study.model)

    def load(self, name: str | Path) -> Model:
        """A model, as the study loads all of them."""
        study = self.study
        return load_model(
            name,
            kind=study.kind,  # type: ignore[arg-type]
            dtype=study.dtype,
            device=study.device,
            quantization=study.quantization,  # type: ignore[arg-type]
        )

    def work(self, *names: str) -> Path:
        """A folder for intermediate results, of this study's settings only."""
        return self.folder.joinpath("work", *(name.replace("/", "-") for name in names))

    @once
    def pairs(self, behaviour: str) -> Pairs:
        """Training and held-out pairs; the held-out ones halved where a layer has to be chosen."""
        study, brings = self.study, self._built_in(behaviour)
        if study.data is not None:
            name = self._authors(behaviour)
            train, held_out = (
                replace(load_pairs(Path(study.data) / part), name=behaviour, about=brings.about if brings else {})
                for part in (f"generate/{name}/generate_dataset.json", f"test/{name}/test_dataset_ab.json")
            )
        else:
            train, held_out = load_pairs(behaviour).split(held_out=study.held_out, seed=study.seed)
        train = train[: study.train]
        held_out.require_disjoint(train)
        half = len(held_out) // 2
        if study.layer is not None:
            return Pairs(train, held_out, held_out)
        return Pairs(train, held_out[:half], held_out[half:])

    def _built_in(self, behaviour: str) -> PairSet | None:
        try:
            return load_pairs(behaviour)
        except MissingError:
            return None

    def _authors(self, behaviour: str) -> str:
        """The authors' spelling of a behaviour's folder."""
        wanted = behaviour.removeprefix("ab/")
        return next(
            path.name for path in (Path(self.study.data or "") / "generate").iterdir() if path.name.lower() == wanted
        )

    def open_questions(self, behaviour: str) -> list[str]:
        """All open questions that a behaviour brings."""
        if self.study.data is not None:
            file = Path(self.study.data) / f"test/{self._authors(behaviour)}/test_dataset_open_ended.json"
            return _questions(file)
        return list(load_pairs(behaviour).open_prompts)

    def prompts(self, behaviour: str, n: int) -> list[str]:
        """A few prompts that no vector was made from, however many questions the study asks: open ones, else of held-out pairs."""
        return self.open_questions(behaviour)[:n] or [pair.prompt for pair in self.pairs(behaviour).report[:n]]

    def systems(self, behaviour: str) -> dict[str, str | None]:
        """No system prompt, one for the behaviour and one against it."""
        return self.pairs(behaviour).train.system_prompts

    @once
    def vectors(self, behaviour: str) -> VectorSet:
        """The behaviour's vectors at every layer, with their controls; normalised across behaviours if the study asks for it."""
        own = self._extracted(behaviour)
        if not self.study.normalize:
            return own
        lettered = [name for name in self.study.behaviours if name.startswith("ab/")]
        if behaviour not in lettered or len(lettered) < 2:
            return own
        return normalize_across({name: self._extracted(name) for name in lettered})[behaviour]

    @once
    def _extracted(self, behaviour: str) -> VectorSet:
        file = self.folder / "vectors" / f"{behaviour.replace('/', '-')}.safetensors"
        if not on_main(file.exists):
            found = extract(
                self.model,
                self.pairs(behaviour).train,
                store=self.activations(behaviour, "train"),
                progress=self.progress,
            )
            on_main(lambda: found.save(file))
        return load_vectors(file).map(self._with_study_controls)

    def _with_study_controls(self, v: SteeringVector) -> SteeringVector:
        """The vector with as many of its shuffled-label controls as the study runs."""
        kept = {f"shuffled-{k}" for k in range(self.study.shuffles)}
        chosen = {name: c for name, c in v.controls.items() if name in kept or not name.startswith("shuffled-")}
        return replace(v, controls=chosen)

    def activations(self, behaviour: str, part: str) -> Path:
        """Where the activations of a behaviour's pairs are kept: `"train"` or `"held-out"`."""
        return self.work("activations", behaviour, part)

    def held_out_activations(self, behaviour: str) -> Path:
        """The same for the pairs that report, run if they were not yet."""
        store = self.activations(behaviour, "held-out")
        extract(self.model, self.pairs(behaviour).report, store=store, progress=self.progress)
        return store

    def sweep(
        self, name: str, behaviour: str, vectors: VectorSet | SteeringVector, pairs: PairSet, **options: Any
    ) -> SweepResult:
        """A sweep whose finished items are kept under a name."""
        return sweep(
            self.model,
            vectors,
            pairs,
            batch_size=self.study.batch_size,
            seed=self.study.seed,
            store=self.work(name, behaviour),
            progress=self.progress,
            **options,
        )

    @once
    def layer_sweep(self, behaviour: str) -> SweepResult:
        """Effects by layer, beside controls, on the pairs that choose the layer."""
        vectors = self.vectors(behaviour)
        layers = vectors.layers[:: self.study.layer_step]
        if self.study.layer is not None:
            layers = tuple(sorted({*layers, self.study.layer}))
        return self.sweep(
            "layers",
            behaviour,
            vectors,
            self.pairs(behaviour).choose,
            layers=layers,
            multipliers=(-1, 1),
            controls=self.study.controls,
        )

    @once
    def layer(self, behaviour: str) -> int:
        """The layer to steer at: the study's, or the one of the largest effect on the pairs that choose it."""
        return int(self.layer_sweep(behaviour).best()["layer"]) if self.study.layer is None else self.study.layer

    def vector(self, behaviour: str) -> SteeringVector:
        """The vector at the chosen layer."""
        return self.vectors(behaviour)[self.layer(behaviour)]

    @once
    def dose(self, behaviour: str) -> SweepResult:
        """Scores by multiplier at the chosen layer under each system prompt, beside controls, on the pairs that report."""
        return self.sweep(
            "dose",
            behaviour,
            self.vector(behaviour),
            self.pairs(behaviour).report,
            multipliers=self.study.multipliers,
            controls=self.study.controls,
            systems=self.systems(behaviour),
        )

    def n_layers(self) -> int:
        """Blocks of the model."""
        return describe(self.model).n_layers

    def several(self, needed: int, what: str) -> Mapping[str, VectorSet]:
        """All behaviours' vectors.

        Raises:
            NotRun: fewer behaviours than a claim needs.
        """
        if len(self.study.behaviours) < needed:
            raise NotRun(f"{what} needs {needed} behaviours, the study has {len(self.study.behaviours)}")
        return {name: self.vectors(name) for name in self.study.behaviours}


def _questions(file: Path) -> list[str]:
    """The authors' open questions; none where there is no such file."""
    if not file.exists():
        return []
    try:
        return [str(item["question"]) for item in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no list of objects with the key 'question' ({error!r}).") from error
