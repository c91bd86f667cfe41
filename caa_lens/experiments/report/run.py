"""Running a study: every claim for every behaviour, each kept as soon as it is found, and the report written from what is kept."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from caa_lens.errors import CaaLensError
from caa_lens.experiments.report.checks import check_layer
from caa_lens.experiments.report.claims import CLAIMS, Claim
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.page import write_page
from caa_lens.experiments.report.published import keep_published
from caa_lens.experiments.report.section import Section, read_section, save_section
from caa_lens.experiments.report.study import EXTENDED, Study
from caa_lens.files import claim_folder, is_claimed, write_json
from caa_lens.models import Model, describe
from caa_lens.workers import is_main, on_main

VERSIONS = ("caa-lens", "transformer-lens", "transformers", "torch")


def reproduce(
    study: Study,
    out: str | os.PathLike[str],
    *,
    model: Model | None = None,
    progress: bool = True,
    say: Callable[[str], object] = print,
) -> Path:
    """Runs a study and writes its report; a second call with the same study goes on where the first was stopped.

    Args:
        study: what to run; see `load_study`.
        out: the study's folder: `report.html`, `sections/` (tables as parquet, CSV and LaTeX; figures as PNG and SVG), `vectors/`,
            `published/` where there are published numbers, and `work/`, which can be deleted when the study is finished.
        model: a model that is already loaded, in place of `study.model`.
        progress: show progress bars.
        say: called with a line when a section begins, and at the end.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: the folder holds another study, or the model has no such layer.
        MissingError: there is no such model. What a section lacks stops nothing: it is "not run", and tried again by the next call.
    """
    folder = Path(out)
    on_main(lambda: _begin(folder, study))
    lab = Lab(study, folder, model=model, progress=progress)
    info = describe(lab.model)  # without the model itself there is no section to run
    check_layer(study, info.n_layers)
    for claim, behaviour, place in plan(study, folder):
        needed = claim.of(study) if behaviour is None else ()
        if on_main(lambda place=place, needed=needed: is_done(place, needed)):  # type: ignore[misc]
            continue
        if is_main():
            say(f"claim {claim.number}, {claim.title}: {behaviour or 'all behaviours'}")
        started = time.perf_counter()
        section = _examine(lab, claim, behaviour)
        if is_main():
            _keep(folder, place, replace(section, made_from=needed), time.perf_counter() - started)
    about = {"model": info.name, "revision": info.revision, "layers": info.n_layers, "d_model": info.d_model}
    return on_main(lambda: _publish(folder, about))


def _keep(folder: Path, place: Path, section: Section, seconds: float) -> None:
    if place.exists():
        if section.status == "not run" and read_section(place).status != "not run":
            return  # what is there, of other behaviours or with gaps, is of more use than why it cannot be made now
        shutil.rmtree(place)
    save_section(place, section)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"section": place.name, "seconds": round(seconds, 1)}) + "\n")


def _publish(folder: Path, about: Mapping[str, object]) -> Path:
    write_json(folder / "model.json", about)
    return write_page(folder)


def plan(study: Study, folder: Path) -> list[tuple[Claim, str | None, Path]]:
    """The sections of a study in the order in which they are run: claim, behaviour (None for all together), folder."""
    found: list[tuple[Claim, str | None, Path]] = []
    for claim in CLAIMS:
        if claim.number in study.claims:
            names = [name for name in study.behaviours if claim.concerns(study, name)] if claim.each else []
            found += [(claim, name, section_folder(folder, claim, name)) for name in names]
            if claim.all_together:
                found.append((claim, None, section_folder(folder, claim, None)))
    return found


def section_folder(folder: Path, claim: Claim, behaviour: str | None) -> Path:
    """Where a section is kept."""
    return folder / "sections" / f"{claim.number:02d}-{(behaviour or 'all').replace('/', '-')}"


def is_done(place: Path, needed: tuple[str, ...] = ()) -> bool:
    """Whether a section was run, whole and from the behaviours needed at least; otherwise it is tried again."""
    if not (place / "section.json").exists():
        return False
    found = read_section(place)
    return found.status != "not run" and found.complete and set(needed) <= set(found.made_from)


def _examine(lab: Lab, claim: Claim, behaviour: str | None) -> Section:
    try:
        if behaviour is None:
            assert claim.all_together is not None
            return claim.all_together(lab)
        assert claim.each is not None
        return claim.each(lab, behaviour)
    except CaaLensError as error:
        # What one section lacks (an extra, a judge that answers, a base model that is there) must not stop the others.
        return Section("not run", f"Not run: {error}")


def _begin(folder: Path, study: Study) -> None:
    """Marks the folder as the study's, and writes the published numbers that are shown beside its own.

    Raises:
        InputError: the folder is another's, or there are no such numbers.
    """
    _sign(folder, study)
    if study.published is not None:
        keep_published(folder, study.published)


def _sign(folder: Path, study: Study) -> None:
    """Marks the folder as the study's.

    Raises:
        InputError: it is another's.
    """
    file = folder / "study.json"
    settings = asdict(study)
    if is_claimed(file, study.signature, "study"):  # refuses another's
        before = json.loads(file.read_text(encoding="utf-8"))["study"]
        # What an earlier call examined stays in the report.
        settings["published"] = study.published or before["published"]
        settings |= {name: list(dict.fromkeys([*before[name], *settings[name]])) for name in EXTENDED}
    # Written again where the study goes on: it records the versions that it goes on with.
    about = {"study": settings, "versions": {name: version(name) for name in VERSIONS}}
    claim_folder(file, study.signature, about)
