"""Answers to open questions with what a text tells of itself, without a judge.

    n_tokens   length of the answer
    repeated   1 - distinct 3-grams / 3-grams of its tokens: near 0 in ordinary prose, towards 1 where a text runs in circles
    logprob    mean over its tokens of log p(token | text before it) of the UNSTEERED model, nats per token: fluency

Degeneration shows in `repeated` rising, or in `logprob` falling far below the unsteered answers'. A text that runs in circles is
likely by `logprob`: read the two together. Both speak of the text only, and not of whether it shows the behaviour.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from caa_lens.errors import InputError
from caa_lens.experiments.effects import Measurement
from caa_lens.experiments.statistics import bootstrap_mean
from caa_lens.files import atomic_path
from caa_lens.pairs import PairSet

DIAGNOSTICS = ("n_tokens", "repeated", "logprob")
DEFAULTS: dict[str, Any] = {"vector": "none", "layer": -1, "multiplier": 0.0}
"""Of answers that come from elsewhere and do not say how they were made."""


@dataclass(frozen=True)
class AnswerSet(Measurement):
    """Answers at several strengths.

    Attributes:
        items: one row an answer: `item` (the prompt's number), `prompt`, `system` (where systems were given), `vector`, `layer`,
            `multiplier`, `answer`, and the diagnostics `n_tokens`, `repeated`, `logprob` where a model measured them.
            Multiplier 0 is the unsteered model.
        provenance: model, template, settings, seed, versions.
        seed: of the bootstrap.
    """

    provenance: dict[str, Any]
    seed: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        made_by = self.provenance.get("model", "elsewhere")
        return f"AnswerSet({len(self)} answers to {self.items['item'].nunique()} prompts, {made_by})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a (system, vector, layer, multiplier): `n` answers, `empty` ones, and the mean of each diagnostic with its 95%
        interval over prompts (`repeated`, `repeated_low`, `repeated_high`, ...)."""
        rows: list[dict[str, Any]] = []
        axes = [*self.axes, "multiplier"]
        for place, group in self.items.groupby(axes, sort=False):
            row = dict(zip(axes, place, strict=True))
            row |= {"n": len(group), "empty": int((group["answer"].str.strip() == "").sum())}
            for name in DIAGNOSTICS:
                if name in group:
                    bounds = (-math.inf, 0.0) if name == "logprob" else (0.0, math.inf)
                    values = group[name].dropna().to_numpy(float)
                    estimate = bootstrap_mean(values, seed=self.seed, bounds=bounds)
                    row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            rows.append(row)
        return pd.DataFrame(rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `.json` (provenance and items), or `.jsonl` (provenance in the first line, then an answer a line); whole or not
        at all.

        Raises:
            InputError: another suffix.
        """
        target = Path(path)
        records = json.loads(self.items.to_json(orient="records"))
        if target.suffix == ".json":
            text = json.dumps({"provenance": self.provenance, "seed": self.seed, "items": records}, ensure_ascii=False)
        elif target.suffix == ".jsonl":
            lines = [{"provenance": self.provenance, "seed": self.seed}, *records]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        else:
            raise InputError(f"{target.name}: allowed suffixes are .json and .jsonl.")
        with atomic_path(target) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AnswerSet:
        """Reads a file of `save`, or JSON lines from elsewhere with `prompt` and `answer` (and `vector`, `layer`, `multiplier`,
        where they are known), to be judged like any others.

        Raises:
            InputError: a file that cannot be read, or a record without prompt or answer; the message names it.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8-sig")
            if file.suffix == ".json":
                head = json.loads(text)
                records = head["items"]
            else:
                records = [json.loads(line) for line in text.splitlines() if line.strip()]
                head = records.pop(0) if records and "provenance" in records[0] else {}
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{file} cannot be read as answers ({error}); it may be cut short. Save it again with AnswerSet.save()."
            ) from error
        return cls.of(records, head.get("provenance", {"source": file.name}), seed=head.get("seed", 0))

    @classmethod
    def of(
        cls, records: Iterable[Mapping[str, Any]], provenance: Mapping[str, Any] | None = None, *, seed: int = 0
    ) -> AnswerSet:
        """Answers from records with `prompt` and `answer`; further columns are kept, and missing settings are those of the
        unsteered model.

        Raises:
            InputError: no record, or one without a prompt or an answer.

        Example:
            >>> AnswerSet.of([{"prompt": "Hello?", "answer": "Good day."}]).items["multiplier"].tolist()
            [0.0]
        """
        rows = list(records)
        for number, row in enumerate(rows):
            if not all(isinstance(row.get(key), str) for key in ("prompt", "answer")):
                raise InputError(
                    f"answer {number}: it needs the texts 'prompt' and 'answer'; found the keys {', '.join(map(str, row))}."
                )
        if not rows:
            raise InputError("no answers: give at least one record with 'prompt' and 'answer'.")
        items = pd.DataFrame([{**DEFAULTS, **row} for row in rows])
        if "item" not in items:
            items.insert(0, "item", items["prompt"].map({p: n for n, p in enumerate(dict.fromkeys(items["prompt"]))}))
        first = [
            "item",
            "prompt",
            *(axis for axis in ("system", "vector", "layer") if axis in items),
            "multiplier",
            "answer",
        ]
        items = items[[*first, *(column for column in items if column not in first)]]
        return cls(items.astype({"layer": int, "multiplier": float}), dict(provenance or {}), seed)


def known_answers(pairs: PairSet) -> AnswerSet:
    """The two completions of each pair as answers at multiplier +1 (positive) and -1 (negative): what a judge should tell apart.

    `judge(known_answers(held_out), rubric, j).verdict()` says whether `j` does, before it is believed on other texts.

    Args:
        pairs: free-text pairs; the letters of multiple-choice pairs are no answers.

    Raises:
        InputError: multiple-choice pairs.
    """
    if any(pair.key for pair in pairs):
        raise InputError(
            f"the completions of {pairs.name!r} are answer letters, which say nothing without their question."
        )
    records = [
        {"item": number, "prompt": pair.prompt, "vector": "vector", "multiplier": sign, "answer": text}
        for number, pair in enumerate(pairs)
        for sign, text in ((-1.0, pair.negative), (1.0, pair.positive))
    ]
    return AnswerSet.of(records, {"pairs": pairs.name, "pairs_hash": pairs.hash, "known": True})


def repeated_share(tokens: Sequence[int], n: int = 3) -> float:
    """1 - distinct n-grams / n-grams; 0 where there is none.

    Example:
        >>> repeated_share([1, 2, 3, 1, 2, 3]), repeated_share([7, 8])
        (0.25, 0.0)
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
