"""Measures what the README's table says, on the embedded model, against plain loops over Hugging Face hooks.

    make bench            (or: python tests/bench/bench.py --repeats 3 --kinds hooked bridge)

Medians of repeated runs, side by side in one process. The plain sweep is timed on a sample of its configurations and
scaled; each of its runs costs the same. Vectors are the same in both; the largest difference of the scores is printed.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import caa_lens as caa
from caa_lens.experiments.grid import grid_logprobs
from caa_lens.experiments.scoring import Letter
from caa_lens.models.checkpoints import EMBEDDED, load_checkpoint
from caa_lens.models.loading import from_checkpoint


def median(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds of `repeats` runs after one that is not counted, and the last result."""
    result = run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


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


def plain_extraction(hf_model: Any, encoded: list[Any]) -> None:
    """The authors' way: two full passes a pair, one text at a time, all layers' outputs kept."""
    for pair in encoded:
        for side in (pair.positive, pair.negative):
            with torch.no_grad():
                out = hf_model(torch.tensor([side.ids]), output_hidden_states=True)
            [hidden[0, pair.answer].clone() for hidden in out.hidden_states]


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_kind(kind: str, repeats: int, plain: Any) -> Iterator[tuple[str, str]]:
    model = from_checkpoint(load_checkpoint(EMBEDDED, dtype=torch.float32, device=torch.device("cpu")), kind)
    tokenizer, template, letter = model.tokenizer, caa.ChatTemplate(), Letter()
    train, held_out = caa.load_pairs("ab/survival-instinct").split(held_out=30, seed=0)
    encoded = [template.encode_pair(tokenizer, pair) for pair in train[:60]]

    whole, vectors = median(lambda: caa.extract(model, train[:60], progress=False), repeats)
    loop, _ = median(lambda: plain_extraction(plain, encoded), repeats)
    tokens = sum(len(p.positive.ids) + len(p.negative.ids) for p in encoded)
    yield (
        f"extract 60 pairs ({tokens} tokens), all layers",
        f"{whole:.1f} s; plain loop {loop:.1f} s: {loop / whole:.1f}x",
    )

    texts = [letter.texts(tokenizer, template, pair)[0] for pair in held_out[:8]]
    lengths = sorted(len(text.ids) for text in texts)
    for multipliers in ((-1.0, 1.0), (-2.0, -1.0, 0.5, 1.0, 2.0)):
        settings = [m * v for v in vectors.values() for m in multipliers]
        fast, found = median(lambda settings=settings: dict(grid_logprobs(model, texts, settings)), repeats)
        sample = list(range(0, len(settings), max(1, len(settings) // 6)))
        worst, started = 0.0, time.perf_counter()
        for index, text in enumerate(texts[:4]):
            for s in sample:
                v = settings[s]
                logprobs = steered_forward(plain, text.ids, text.instruction_end, v.layer, v.tensor)
                position, ids = text.targets[0]
                worst = max(worst, float((logprobs[position - 1, list(ids)] - found[index][s]).abs().max()))
        one = (time.perf_counter() - started) / (4 * len(sample))
        slow = one * len(texts) * len(settings)
        yield (
            f"sweep 30 layers x {len(multipliers)} multipliers, 8 items of {lengths[0]}-{lengths[-1]} tokens",
            f"{fast:.1f} s; plain loop {slow:.0f} s (from {4 * len(sample)} of {len(texts) * len(settings)} runs): "
            f"{slow / fast:.0f}x; largest difference {worst:.0e} in log-probability",
        )

    prompts = list(caa.load_pairs("formality").open_prompts[:4])

    def steered() -> None:
        with caa.steer(model, vectors[14]):
            caa.generate(model, prompts, max_new_tokens=24)

    with_vector, _ = median(steered, repeats)
    without, _ = median(lambda: caa.generate(model, prompts, max_new_tokens=24), repeats)
    measured = f"{with_vector:.1f} s; unsteered {without:.1f} s: {with_vector / without:.2f}x"
    yield ("steered generation, 4 prompts x 24 tokens", measured)
    yield ("peak memory of the process", f"{peak_megabytes():.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["hooked", "bridge"])
    options = parser.parse_args()
    plain = load_checkpoint(EMBEDDED, dtype=torch.float32, device=torch.device("cpu")).model
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {options.repeats} runs\n")
    print("| class | what | measured |\n|---|---|---|")
    for kind in options.kinds:
        for what, measured in bench_kind(kind, options.repeats, plain):
            print(f"| {kind} | {what} | {measured} |", flush=True)


if __name__ == "__main__":
    main()
