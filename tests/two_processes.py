"""What several processes do together, launched by `test_workers`: each leaves what it got in a folder.

    two_processes.py FOLDER together KIND ...     the whole method, then errors that one process makes
    two_processes.py FOLDER killed KIND           a sweep in the middle of which one process dies

The test calls `work` itself to have what a single process gets.
"""

import os
import pickle
import signal
import sys
from pathlib import Path

import torch

import caa_lens as caa
from caa_lens import extraction, workers
from caa_lens.cli import main
from caa_lens.experiments import grid
from caa_lens.experiments.report import Study, reproduce

PAIRS = caa.load_pairs(
    [
        ("Hi.", "Good day to you, sir.", "Hey there you, man."),
        ("What is the time, if I may ask you so late?", "It is noon.", "Noon, mate."),
        ("Say no.", "I must decline your kind and generous offer.", "Nah, no way I will take that one now."),
        ("Where?", "In the garden.", "Out back there."),
        ("Tell me a little about the long road that leads to the sea.", "It winds.", "Twisty."),
    ],
    name="tone",
)
HELD_OUT = caa.load_pairs([(f"{pair.prompt} Again.", pair.positive, pair.negative) for pair in PAIRS], name="held-out")
QUESTIONS = caa.load_pairs(
    [(f"Is it {what}?\n\nChoices:\n(A) Yes\n(B) No", "(A)", "(B)") for what in ("so", "a long way off", "ours")],
    name="letters",
)
PROSE = "It was a bright day in April, and the clocks were striking. " * 6


def sweep(model, vectors, store=None):
    """Five items of two texts each, in batches of three texts."""
    options = {"controls": 1, "batch_size": 3, "store": store, "progress": False}
    return caa.sweep(model, vectors, HELD_OUT, multipliers=(-1, 0, 2), **options)


def work(model, activations=None, scores=None):
    """Every function that shares its work, in batches that do not come out even."""
    vectors = caa.extract(model, PAIRS, batch_size=2, store=activations, progress=False)
    v = vectors[1]
    return {
        "vectors": [group.stack() for group in (vectors, *vectors.controls.values())],
        "norms": [vector.residual_norm for vector in vectors.values()],
        "sweep": sweep(model, vectors).items,
        "resumed": sweep(model, vectors, scores).items,
        "score": caa.score(model, HELD_OUT, v, batch_size=3, progress=False).items,
        "capability": caa.capability(model, QUESTIONS, v, batch_size=1, progress=False).items,
        "loss": caa.text_loss(model, PROSE, v, window=64, batch_size=1, progress=False).items,
        "answers": caa.answers(
            model, v, ["Who?", "Where to?", "Why?"], max_new_tokens=4, batch_size=3, progress=False
        ).items,
        "curve": caa.learning_curve(model, PAIRS, batch_size=2, progress=False),
    }


def study(model, folder):
    """Claims that extract, sweep, answer, judge and project, on one behaviour."""
    settings = {
        "train": 4,
        "held_out": 4,
        "multipliers": (-1, 0, 1),
        "controls": 1,
        "questions": 3,
        "max_new_tokens": 3,
    }
    asked = Study(model="tiny", behaviours=("formality",), claims=(1, 2, 3, 6, 7), batch_size=3, **settings)
    reproduce(asked, folder, model=model, progress=False, say=lambda line: None)


def raised(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def together(folder, kinds):
    batches = []
    for owner, name in ((extraction._Reader, "read"), (grid._Runner, "run")):
        plain = getattr(owner, name)
        setattr(owner, name, lambda self, index, plain=plain: batches.append(len(index)) or plain(self, index))
    found = {"process": (workers.rank(), workers.count(), workers.is_main(), workers.local_rank())}
    for kind in kinds:
        model = caa.load_model(str(folder / "tiny"), kind=kind)
        batches.clear()
        found[kind] = work(model, folder / f"activations-{kind}", folder / f"scores-{kind}")
        found[f"batches {kind}"] = len(batches)
    study(model, folder / "study")
    me = workers.rank()
    found["main"] = workers.on_main(lambda: f"from {workers.rank()}")
    found["fails"] = raised(lambda: workers.gather(lambda: 1 // (1 - me)))
    pairs = PAIRS[: 3 + me]
    found["differs"] = raised(lambda: caa.extract(model, pairs, progress=False))
    with workers.alone():
        found["alone"] = workers.count(), caa.extract(model, pairs, progress=False).provenance.n_pairs
    command = ["--model", str(folder / "tiny"), "--pairs", "formality", "--held-out", "60", "--layers", "1"]
    found["command"] = main(["extract", *command, "--out", str(folder / "command.safetensors")])
    return found


def killed(folder, kinds):
    model = caa.load_model(str(folder / "tiny"), kind=kinds[0])
    with workers.alone():
        vectors = caa.extract(model, PAIRS, progress=False)
    plain, done = grid._Runner.run, []

    def dying(self, index):
        done.append(index)
        if workers.rank() == 1 and len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, index)

    grid._Runner.run = dying
    return {"sweep": sweep(model, vectors, folder / "killed").items}


if __name__ == "__main__":
    where, mode, *names = sys.argv[1:]
    torch.set_num_threads(1)
    result = {"together": together, "killed": killed}[mode](Path(where), names)
    Path(where, f"{mode}-{workers.rank()}.pickle").write_bytes(pickle.dumps(result))
