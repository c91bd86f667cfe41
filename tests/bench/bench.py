"""Measures what the README's table says, on the embedded model, and writes the table there.

    make bench            (or: python tests/bench/bench.py --repeats 3 --others PYTHON --write)

Ours and what it is compared with take turns in one process (the other libraries in theirs, between turns), and medians are
reported. The plain sweep is timed on a sample of its runs, which cost the same each, and scaled.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import caa_lens as caa
from caa_lens.experiments.grid import grid_logprobs
from caa_lens.experiments.scoring import Letter
from caa_lens.extraction_plan import plan_extraction
from caa_lens.models import pad, run
from caa_lens.models.checkpoints import EMBEDDED, load_checkpoint
from caa_lens.models.loading import from_checkpoint
from caa_lens.prefixes import PrefixRunner, common_head

README = Path(__file__).parents[2] / "README.md"
KINDS = ("hooked", "bridge")
GRIDS = ((-1.0, 1.0), (-2.0, -1.0, 0.5, 1.0, 2.0))
LENGTHS = range(80, 151)
ITEMS, PAIRS, PAIR_LENGTHS = 8, 60, range(95, 107)


def in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns so that what else the machine does falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run_once in runs.items():
            started = time.perf_counter()
            run_once()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def medians(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each."""
    return {name: statistics.median(taken) for name, taken in in_turns(runs, repeats).items()}


def steered_forward(hf_model: Any, ids: tuple[int, ...], end: int, layer: int, direction: torch.Tensor) -> torch.Tensor:
    """The authors' way: one text, one configuration, one full forward pass with a hook on a decoder layer."""

    def add_hook(module: Any, args: Any, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[:, end:] += direction
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = hf_model.model.layers[layer].register_forward_hook(add_hook)
    with torch.no_grad():
        logits = hf_model(torch.tensor([ids])).logits
    handle.remove()
    return logits.log_softmax(-1)[0]


def plain_extraction(hf_model: Any, encoded: Sequence[Any]) -> None:
    """The authors' way: two full passes a pair, one text at a time, all layers' outputs kept."""
    for pair in encoded:
        for side in (pair.positive, pair.negative):
            with torch.no_grad():
                out = hf_model(torch.tensor([side.ids]), output_hidden_states=True)
            [hidden[0, pair.answer].clone() for hidden in out.hidden_states]


def one_pass(model: Any, encoded: Sequence[Any], batch_size: int = 16) -> Callable[[], None]:
    """The limit: one batched pass without unembedding over the tokens behind what all prompts begin with."""
    rows = sorted((pair.positive.ids[: pair.answer + 1] for pair in encoded), key=len)
    head = common_head(rows, limit=len(rows[0]))
    prefixes = PrefixRunner(model, head)

    @torch.no_grad()
    def run_all() -> None:
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            tokens, mask = pad([row[len(head) :] for row in batch], side="right", device=torch.device("cpu"))
            run(model, tokens, mask, past=prefixes.run([head] * len(batch)))

    return run_all


def lettered_pairs() -> list[caa.ContrastPair]:
    return [pair for name in caa.behaviours() if name.startswith("ab/") for pair in caa.load_pairs(name)]


class Bench:
    """The inputs that all measurements share, and the table that they fill: {what: {column: text}}."""

    def __init__(self, repeats: int, others: str | None) -> None:
        self.repeats, self.others = repeats, others
        checkpoint = load_checkpoint(EMBEDDED, dtype=torch.float32, device=torch.device("cpu"))
        self.plain, self.tokenizer = checkpoint.model, checkpoint.tokenizer
        self.models = {
            kind: from_checkpoint(load_checkpoint(EMBEDDED, dtype=torch.float32, device=torch.device("cpu")), kind)
            for kind in KINDS
        }
        template, letter = caa.ChatTemplate(), Letter()
        pairs = lettered_pairs()
        encoded = [template.encode_pair(self.tokenizer, pair) for pair in pairs]
        chosen = [i for i, pair in enumerate(encoded) if pair.answer + 1 in PAIR_LENGTHS][:PAIRS]
        self.encoded = [encoded[i] for i in chosen]
        self.pairs = caa.load_pairs([pairs[i] for i in chosen])
        texts = [letter.texts(self.tokenizer, template, pair)[0] for pair in pairs]
        fitting = sorted((text for text in texts if len(text.ids) in LENGTHS), key=lambda text: len(text.ids))
        self.texts = fitting[:: len(fitting) // ITEMS][:ITEMS]
        self.table: dict[str, dict[str, str]] = {}

    def extraction(self) -> None:
        ours = {
            kind: (lambda model=model: caa.extract(model, self.pairs, progress=False))
            for kind, model in self.models.items()
        }
        limits = {f"{kind} limit": one_pass(model, self.encoded) for kind, model in self.models.items()}
        found = medians({**ours, **limits, "loop": lambda: plain_extraction(self.plain, self.encoded)}, self.repeats)
        compared = {"the paper's loop": found["loop"], **self._other_libraries()}
        best = min(found[kind] for kind in KINDS)
        tokens = [len(pair.positive.ids) for pair in self.encoded]
        self.table[f"extract {len(tokens)} pairs of {min(tokens)}-{max(tokens)} tokens, all layers"] = {
            **{kind: f"{found[kind]:.1f} s" for kind in KINDS},
            "compared with": "; ".join(
                f"{name} {took:.1f} s, **{took / best:.1f}x**" for name, took in compared.items()
            ),
        }
        self.table["the same against the limit: one pass over the differing tokens, without unembedding"] = {
            **{kind: f"{found[kind] / found[f'{kind} limit']:.2f}" for kind in KINDS},
            "compared with": "the limit is " + ", ".join(f"{found[f'{kind} limit']:.1f} s ({kind})" for kind in KINDS),
        }

    def _other_libraries(self) -> dict[str, float]:
        if self.others is None:
            return {}
        rows = [side.ids[: pair.answer + 1] for pair in self.encoded for side in (pair.positive, pair.negative)]
        texts = [self.tokenizer.decode(row) for row in rows]
        given = {
            "ids": rows,
            "pairs": list(zip(texts[::2], texts[1::2], strict=True)),
            "pad_token": self.tokenizer.pad_token,
        }
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "texts.json"
            file.write_text(json.dumps(given), encoding="utf-8")
            script = Path(__file__).with_name("other_libraries.py")
            command = [self.others, str(script), self.plain.name_or_path, str(file), str(self.repeats)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = json.loads(out.strip().splitlines()[-1])
        return {
            f"{name} (best batch size: {size})": took for name, sizes in found.items() for size, took in sizes.items()
        }

    def sweep(self) -> None:
        vectors = caa.extract(self.models["hooked"], self.pairs[:8], progress=False)
        lengths = [len(text.ids) for text in self.texts]
        for multipliers in GRIDS:
            settings = [m * v for v in vectors.values() for m in multipliers]
            sample = [(text, s) for text in range(0, ITEMS, 2) for s in range(0, len(settings), len(settings) // 6)]
            results: dict[str, dict[int, torch.Tensor]] = {}

            def fast(kind: str, settings: list[Any] = settings, results: Any = results) -> None:
                results[kind] = dict(grid_logprobs(self.models[kind], self.texts, settings))

            worst = dict.fromkeys(KINDS, 0.0)

            def slow(
                settings: list[Any] = settings, sample: Any = sample, results: Any = results, worst: Any = worst
            ) -> None:
                for number, s in sample:
                    text, vector = self.texts[number], settings[s]
                    logprobs = steered_forward(self.plain, text.ids, text.instruction_end, vector.layer, vector.tensor)
                    position, ids = text.targets[0]
                    for kind in KINDS:
                        difference = (logprobs[position - 1, list(ids)] - results[kind][number][s]).abs().max()
                        worst[kind] = max(worst[kind], float(difference))

            found = medians({**{k: (lambda k=k: fast(k)) for k in KINDS}, "loop": slow}, self.repeats)
            whole = found["loop"] / len(sample) * len(settings) * ITEMS
            self.table[
                f"sweep 30 layers x {len(multipliers)} multipliers, {ITEMS} items of {min(lengths)}-{max(lengths)} tokens"
            ] = {
                **{k: f"{found[k]:.1f} s, **{whole / found[k]:.0f}x**" for k in KINDS},
                "compared with": f"a loop of full passes, {whole:.0f} s (scaled from {len(sample)} of {len(settings) * ITEMS}); "
                + f"log-probabilities differ by at most {max(worst.values()):.0e}",
            }

    def generation(self) -> None:
        vector = caa.extract(self.models["hooked"], self.pairs[:4], progress=False)[14]
        prompts = list(caa.load_pairs("formality").open_prompts[:4])
        row = {}
        for kind, model in self.models.items():

            def steered(model: Any = model) -> None:
                with caa.steer(model, 0.1 * vector):
                    caa.generate(model, prompts, max_new_tokens=24)

            def unsteered(model: Any = model) -> None:
                caa.generate(model, prompts, max_new_tokens=24)

            unsteered()
            found = in_turns({"steered": steered, "unsteered": unsteered}, max(9, self.repeats))
            # A few percent are less than the machine's own drift, so each run is compared with the one beside it.
            ratio = statistics.median(a / b for a, b in zip(found["steered"], found["unsteered"], strict=True))
            row[kind] = f"{statistics.median(found['steered']):.2f} s, {ratio - 1:+.1%}"
        self.table["generate 24 tokens for 4 prompts, steered"] = {**row, "compared with": "the same class, unsteered"}

    def memory(self) -> None:
        row = {}
        for kind in KINDS:
            few, many = (statistics.median(peak_of(kind, number) for _ in range(self.repeats)) for number in (60, 600))
            row[kind] = f"{few:.0f} -> {many:.0f} MB, {many / few - 1:+.1%}"
        self.table["peak memory of the process while it extracts 60 -> 600 pairs"] = {**row, "compared with": ""}


def peak_of(kind: str, number: int) -> float:
    command = [sys.executable, __file__, "--memory", kind, str(number)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def extract_and_print_peak(kind: str, number: int) -> None:
    """Of `number` lettered pairs spread over all lengths, the longest included."""
    model = from_checkpoint(load_checkpoint(EMBEDDED, dtype=torch.float32, device=torch.device("cpu")), kind)
    plan = plan_extraction(model, caa.load_pairs(lettered_pairs()))
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on: loading has one of its own
    by_length = [plan.pairs[i] for batch in plan.batches for i in batch][:600]
    caa.extract(model, caa.load_pairs(by_length[:: 600 // number]), progress=False)
    # Of this process alone: what getrusage() reports begins at the peak of the process that started it.
    print(int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024)


def as_markdown(table: Mapping[str, Mapping[str, str]], repeats: int) -> str:
    columns = [*KINDS, "compared with"]
    lines = ["| | `HookedTransformer` | `TransformerBridge` | compared with |", "|---|---|---|---|"]
    lines += [f"| {what} | {' | '.join(row[column] for column in columns)} |" for what, row in table.items()]
    lines += [
        "",
        f"SmolLM2-135M-Instruct, fp32, CPU, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}; "
        f"medians of {repeats} runs taken in turns; factors in the extraction row are of the faster class.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--others", help="Python of an environment with steering-vectors and repeng")
    parser.add_argument("--only", nargs="+", default=["extraction", "sweep", "generation", "memory"])
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        return extract_and_print_peak(options.memory[0], int(options.memory[1]))
    bench = Bench(options.repeats, options.others)
    for name in options.only:
        getattr(bench, name)()
        print(as_markdown(bench.table, options.repeats), "\n", flush=True)
    if options.write:
        between = re.compile(r"(<!-- bench -->\n).*(\n<!-- /bench -->)", re.DOTALL)
        table = as_markdown(bench.table, options.repeats)
        README.write_text(
            between.sub(lambda m: m[1] + table + m[2], README.read_text(encoding="utf-8")), encoding="utf-8"
        )
    return None


if __name__ == "__main__":
    main()
