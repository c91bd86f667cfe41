"""What a study runs: a model, behaviours, claims and sizes, read from a preset, a YAML file or keyword arguments.

Presets: `embedded` (the small model that comes as a package, under half an hour on two processor cores) and the paper's four models
with its settings: `llama-2-7b-chat`, `llama-2-13b-chat`, `llama-2-7b`, `llama-2-13b`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from caa_lens.errors import InputError, MissingError
from caa_lens.experiments.report.checks import check_kind, check_settings
from caa_lens.files import digest
from caa_lens.sources import behaviours as built_in

CLAIMS = tuple(range(1, 11))
EXTENDED = ("behaviours", "claims", "finetune")
"""What a further run in a study's folder may ask for beside what is there."""


@dataclass(frozen=True)
class Study:
    """The settings of a study; every one of them is recorded in the report.

    Attributes:
        model: as in `load_model`.
        behaviours: built-in sets; with `data`, the authors' behaviours. `("all",)` is all there are.
        claims: numbers of the claims to examine; the report lists them.
        kind, dtype, device, quantization: as in `load_model`; of every model that the study loads.
        data: the `datasets` folder of the authors' repository: their training, test, open-ended, MMLU and TruthfulQA files are used
            in place of the built-in sets.
        published: the authors' `results` folder, whose numbers are shown beside the model's.
        base: another model of equal width, whose vectors are compared with the model's (base and chat).
        train: at most so many training pairs; None for all.
        held_out: held-out pairs a behaviour, of built-in sets. Half of them choose the layer, the others report it.
        layer: the layer to steer at; None has it chosen by the layer sweep. Given, all held-out pairs report.
        layer_step: sweep every so many layers.
        multipliers: of the dose-response curves.
        controls: random directions.
        shuffles: vectors of shuffled labels, up to 3; the letter vectors of lettered pairs are always run.
        normalize: give all behaviours' vectors one norm a layer, as the paper does.
        published_score: report the authors' formula of the score too.
        questions: open questions a behaviour; 0 leaves out generated answers.
        max_new_tokens: the longest generated answer.
        judge: who scores generated answers: `"local"` (the model itself reads the rubric), `"local:MODEL"` or `"openai:MODEL"`.
        examples: worked examples in few-shot prompts; None for as many as fit, up to 8.
        finetune: behaviours to fine-tune on as a baseline; none, or `("none",)`, leaves it out.
        method, epochs: of the fine-tuning.
        capability: questions of each kind, and windows of text, to measure what steering costs; None for all.
        batch_size: items run together; changes speed and memory only.
        seed: of splits, controls, sampling and training.
    """

    model: str
    behaviours: tuple[str, ...] = ("all",)
    claims: tuple[int, ...] = CLAIMS
    kind: str | None = None
    dtype: str | None = None
    device: str | None = None
    quantization: str | None = None
    data: str | None = None
    published: str | None = None
    base: str | None = None
    train: int | None = None
    held_out: int = 30
    layer: int | None = None
    layer_step: int = 1
    multipliers: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    controls: int = 3
    shuffles: int = 3
    normalize: bool = False
    published_score: bool = False
    questions: int = 20
    max_new_tokens: int = 64
    judge: str = "local"
    examples: int | None = None
    finetune: tuple[str, ...] = ()
    method: str = "lora"
    epochs: int = 1
    capability: int | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in get_type_hints(type(self)).items():
            check_kind(name, getattr(self, name), allowed)
        unknown = set(self.claims) - set(CLAIMS)
        if unknown or not self.claims:
            raise InputError(f"claims={list(self.claims)}: allowed are numbers from 1 to {CLAIMS[-1]}, at least one.")
        check_settings(self)
        object.__setattr__(self, "behaviours", self._named_behaviours())
        if self.finetune == ("none",):
            object.__setattr__(self, "finetune", ())
        stray = [name for name in self.finetune if name not in self.behaviours]
        if stray:
            raise InputError(
                f"finetune={list(self.finetune)}: {stray[0]!r} is not among the study's behaviours, "
                f"{', '.join(self.behaviours)}; leave it out, or add it to them."
            )

    def _named_behaviours(self) -> tuple[str, ...]:
        known = built_in()
        if self.data is not None:
            folders = sorted(path.parent.name for path in Path(self.data).glob("generate/*/generate_dataset.json"))
            known = tuple(f"ab/{name.lower()}" for name in folders)
            if not known:
                raise InputError(
                    f"{self.data} holds no generate/<behaviour>/generate_dataset.json; give the datasets folder."
                )
        if self.behaviours == ("all",):
            return known
        unknown = [name for name in self.behaviours if name not in known]
        if unknown or not self.behaviours:
            raise MissingError(f"no behaviour {unknown[0] if unknown else ''!r}; there are {', '.join(known)}, or all.")
        return self.behaviours

    @property
    def signature(self) -> str:
        """A digest of everything that changes the numbers of a section, in which two runs of one study agree."""
        free = {*EXTENDED, "published", "batch_size"}
        if self.normalize:  # every vector's norm is then of all behaviours
            free.remove("behaviours")
        settings = {name: value for name, value in asdict(self).items() if name not in free}
        if self.data is not None:
            settings["data"] = str(Path(self.data).resolve())
        return digest(settings)[:16]


def presets() -> tuple[str, ...]:
    """Names of the studies that come with the package."""
    folder = resources.files("caa_lens.experiments.report") / "presets"
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def load_study(source: str | os.PathLike[str], **changes: Any) -> Study:
    """A study from a preset's name or a YAML file, with changes.

    Args:
        source: a name of `presets()`, or the path of a YAML file whose keys are those of `Study`.
        **changes: settings to change; None leaves a setting as it is. Where `behaviours` are changed and `finetune` is not, only
            those of them are fine-tuned on.

    Raises:
        MissingError: neither a preset nor a file.
        InputError: the file is no mapping of settings, or a setting cannot be used.

    Example:
        >>> load_study("embedded", behaviours=("formality",), claims=(1, 2)).claims
        (1, 2)
    """
    if str(source) in presets():
        text = (resources.files("caa_lens.experiments.report") / "presets" / f"{source}.yaml").read_text("utf-8")
    elif Path(source).is_file():
        text = _utf8(Path(source))
    else:
        raise MissingError(f"no study {str(source)!r}: it is neither a file nor one of {', '.join(presets())}.")
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not valid YAML ({error}).") from error
    return study_from(found, f"{source}", **changes)


def _utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error}); save it as UTF-8.") from error


def study_from(settings: Any, origin: str, **changes: Any) -> Study:
    """A study from a mapping of settings.

    Raises:
        InputError: no mapping, an unknown or missing key, or a value that cannot be used.
    """
    allowed = [field.name for field in fields(Study)]
    if not isinstance(settings, Mapping) or "model" not in settings:
        raise InputError(f"{origin}: a study is a mapping with the key 'model', and any of {', '.join(allowed[1:])}.")
    unknown = [key for key in settings if key not in allowed]
    if unknown:
        raise InputError(f"{origin}: unknown key {unknown[0]!r}; allowed are {', '.join(allowed)}.")
    changed = {name: value for name, value in changes.items() if value is not None}
    given = {**settings, **changed}
    made: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    chosen, tuned = changed.get("behaviours", ("all",)), made.get("finetune")
    if tuple(chosen) != ("all",) and "finetune" not in changed and isinstance(tuned, tuple):
        made["finetune"] = tuple(name for name in tuned if name in chosen)
    return Study(**made)


def study_of(source: str | None, model: str | None, **changes: Any) -> Study:
    """The study that a command asks for: the named one, else the model's preset, else the defaults for the model.

    Args:
        source: a preset or a file; None for the model's.
        model: in place of the study's own; None for the embedded model where there is no study either.
        **changes: settings to change; None leaves a setting as it is.
    """
    if source is not None:
        return load_study(source, model=model, **changes)
    model = model or "smollm2-135m-instruct"
    own = [name for name in presets() if load_study(name).model == model]
    return load_study(own[0], **changes) if own else study_from({"model": model}, "study", **changes)
