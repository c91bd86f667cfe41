"""Times steering-vectors and repeng on given texts; runs in an environment of its own, which `make bench` builds.

python other_libraries.py CHECKPOINT_FOLDER TEXTS.json REPEATS    prints {library: {batch size: median seconds}} as JSON
"""

import json
import statistics
import sys
import time

import torch
from repeng import ControlVector, DatasetEntry
from steering_vectors import train_steering_vector
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

BATCH_SIZES = (1, 4, 8, 16, 32)


def main(folder: str, texts: str, repeats: int) -> None:
    with open(texts, encoding="utf-8") as file:
        given = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", pad_token=given["pad_token"])
    pairs = [(positive, negative) for positive, negative in given["pairs"]]
    if [tokenizer(text)["input_ids"] for pair in pairs for text in pair] != given["ids"]:
        raise SystemExit("the texts are tokenised differently here; the comparison would not be of the same tokens")
    layers = list(range(model.config.num_hidden_layers))
    runs = {
        "steering-vectors": lambda some, size: train_steering_vector(
            model, tokenizer, some, layers=layers, batch_size=size, read_token_index=-1
        ),
        "repeng": lambda some, size: ControlVector.train(
            model,
            tokenizer,
            [DatasetEntry(positive=positive, negative=negative) for positive, negative in some],
            hidden_layers=layers,
            batch_size=size,
            method="pca_diff",
        ),
    }
    found: dict[str, dict[int, float]] = {}
    for name, run in runs.items():
        # The best batch size is looked for on half of the pairs, and timed on all.
        once = {size: seconds(run, pairs[::2], size) for size in BATCH_SIZES}
        best = min(once, key=lambda size: once[size])
        found[name] = {best: statistics.median(seconds(run, pairs, best) for _ in range(repeats))}
    print(json.dumps(found))


def seconds(run, pairs, size: int) -> float:
    started = time.perf_counter()
    run(pairs, size)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
