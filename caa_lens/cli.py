"""The command line: its commands and options; `commands` says what they do."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import caa_lens as caa
from caa_lens import commands, workers
from caa_lens.formats import FORMATS
from caa_lens.models.checkpoints import EMBEDDED


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 1 for a `CaaLensError` (whose message is printed), 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        with _quiet_beside_main():
            arguments.run(arguments)
    except caa.CaaLensError as error:
        print(f"caa-lens: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("caa-lens: interrupted; what was stored stays, run the same command to go on.", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _quiet_beside_main() -> Iterator[None]:
    """Of several processes launched together, only the main one prints; errors speak for each."""
    if workers.is_main():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="caa-lens", description="Contrastive activation addition for TransformerLens models."
    )
    parser.add_argument("--version", action="version", version=f"caa-lens {caa.__version__}")
    readable = [name for name, entry in FORMATS.items() if entry.load]
    writable = [name for name, entry in FORMATS.items() if entry.save]
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[Any], None], text: str, example: str, *, loads: bool = True
    ) -> argparse.ArgumentParser:
        added = subparsers.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        if not loads:
            return added
        added.add_argument("--model", default=EMBEDDED, help=f"hub id, directory, .gguf file (default {EMBEDDED})")
        added.add_argument("--kind", choices=("hooked", "bridge"), help="TransformerLens class (default: hooked first)")
        added.add_argument("--dtype", help="float32, bfloat16, ... (default: float32 on the CPU)")
        added.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
        added.add_argument("--n-devices", type=int, default=1, help="GPUs to spread the layers over (default 1)")
        added.add_argument("--quantization", choices=("4bit", "8bit"), help="quantised weights (bitsandbytes)")
        return added

    def pair_options(added: argparse.ArgumentParser, *, held_out: int) -> None:
        added.add_argument("--pairs", default="formality", help="built-in behaviour or file (default formality)")
        added.add_argument(
            "--held-out", type=int, default=held_out, help=f"pairs kept for testing (default {held_out})"
        )
        added.add_argument("--seed", type=int, default=0, help="of the split and of random controls (default 0)")

    def steering_options(added: argparse.ArgumentParser) -> None:
        added.add_argument("--vectors", type=Path, required=True, help="file written by extract or demo")
        added.add_argument("--positions", default="after_instruction", help="after_instruction, all, generated, last")

    demo = command(
        "demo",
        commands.demo,
        "Extract a behaviour, measure it beside its controls, and show steered answers.",
        "caa-lens demo --out out",
    )
    pair_options(demo, held_out=30)
    demo.add_argument("--layer", type=int, help="layer to steer at (default: the middle one)")
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for the vectors (default out)")

    extract = command(
        "extract",
        commands.extract,
        "Compute steering vectors from contrast pairs, at every layer.",
        "caa-lens extract --pairs sentiment --out sentiment.safetensors",
    )
    pair_options(extract, held_out=30)
    extract.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    extract.add_argument("--layers", type=int, nargs="+", help="0-based layers (default all)")
    extract.add_argument("--read", help="answer, completion_mean, last or an integer (default: by the kind of pairs)")
    extract.add_argument(
        "--store", type=Path, help="folder that keeps the activations; an interrupted run goes on there"
    )

    generate = command(
        "generate",
        commands.generate,
        "Answer prompts with and without steering.",
        'caa-lens generate "How was your weekend?" --vectors out/formality.safetensors --layer 14 --multipliers -1 0 1',
    )
    generate.add_argument("prompts", nargs="+", help="one or more prompts")
    steering_options(generate)
    generate.add_argument("--layer", type=int, required=True, help="layer of the vector")
    generate.add_argument("--multipliers", type=float, nargs="+", default=[1.0], help="strengths (default 1)")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default 64)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling")

    project = command(
        "project",
        commands.project,
        "Colour the tokens of a text by their projection on a vector, as they are or steered while an answer is generated.",
        'caa-lens project --vectors out/formality.safetensors --text "Good day to you, sir." --html out/projection.html',
    )
    steering_options(project)
    project.add_argument("--text", required=True, help="a user message; with --plain the text as it stands")
    project.add_argument("--plain", action="store_true", help="do not write the text in the model's template")
    project.add_argument("--layer", type=int, help="layer of the vector (default: the middle one)")
    project.add_argument("--measure", choices=("dot", "cosine", "component"), default="dot", help="default dot")
    project.add_argument(
        "--generate", type=int, default=0, metavar="N", help="answer with up to N tokens and show them too"
    )
    project.add_argument("--multiplier", type=float, default=0.0, help="steer at this strength meanwhile (default 0)")
    project.add_argument("--html", type=Path, help="write the coloured text as a page")

    convert = command(
        "convert",
        commands.convert,
        "Write steering vectors in another program's format; what it has no room for is named.",
        "caa-lens convert out/formality.safetensors formality.gguf --layer 14",
        loads=False,
    )
    convert.add_argument("source", help="file, folder or hub:OWNER/NAME")
    convert.add_argument("target", help="file, folder or hub:OWNER/NAME (uploads)")
    convert.add_argument(
        "--from", dest="source_format", choices=readable, help="default: what the file shows itself to be"
    )
    convert.add_argument(
        "--to", dest="target_format", choices=writable, help="default: by the end of the target's name"
    )
    convert.add_argument("--model", help="name of the vectors' model, if the file does not say")
    convert.add_argument("--n-layers", type=int, help="depth of that model")
    convert.add_argument("--layer", type=int, help="this layer only; of a bare tensor, its layer (0-based)")
    convert.add_argument("--shift", type=int, default=0, help="added to a GGUF's layers; -1 for llama.cpp's generator")
    convert.add_argument("--behaviour", help="name of the vectors, if the file does not say")
    convert.add_argument("--feature", type=int, help="feature of an SAE")
    reproduce = command(
        "reproduce",
        commands.reproduce,
        "Examine the paper's claims on a model and write one report; run it again to go on where it was stopped.",
        "caa-lens reproduce --behaviours formality sentiment --claims 1 2 3 --out study",
    )
    reproduce.set_defaults(model=None)
    reproduce.add_argument("--out", type=Path, required=True, help="folder of the study")
    reproduce.add_argument("--study", help="a preset or a YAML file (default: the preset of the model, if it has one)")
    reproduce.add_argument("--behaviours", nargs="+", help="built-in behaviours, or all (default: the study's)")
    reproduce.add_argument("--claims", type=int, nargs="+", help="numbers of the claims (default: the study's)")
    reproduce.add_argument("--data", help="the authors' datasets folder, in place of the built-in pairs")
    reproduce.add_argument("--published", help="the authors' results folder, shown beside")
    reproduce.add_argument("--judge", help="local, local:MODEL or openai:MODEL (default: the study's)")
    reproduce.add_argument("--layer", type=int, help="layer to steer at (default: chosen by the layer sweep)")
    reproduce.add_argument("--base", help="another model of equal width whose vectors are compared")
    reproduce.add_argument(
        "--finetune", nargs="*", help="behaviours to fine-tune on, or none (default: the study's, of those examined)"
    )
    reproduce.add_argument("--estimate", action="store_true", help="say what it would take, and stop")

    report = command(
        "report",
        commands.report,
        "Write a study's report again, or the tables of the authors' published results; no model is run.",
        "caa-lens report --published CAA/results --out published",
        loads=False,
    )
    report.add_argument("--out", type=Path, required=True, help="folder of the study, or of the tables")
    report.add_argument("--published", type=Path, help="the authors' results folder: write its tables, without a study")

    for name, run, text in (
        ("score", commands.score, "Score held-out pairs under one vector, beside its controls."),
        ("sweep", commands.sweep, "Score held-out pairs over layers and multipliers."),
    ):
        added = command(
            name,
            run,
            text,
            f"caa-lens {name} --vectors out/formality.safetensors --pairs formality "
            + ("--layer 14" if name == "score" else "--layers 10 14 18 --save sweep.parquet"),
        )
        pair_options(added, held_out=30)
        steering_options(added)
        if name == "score":
            added.add_argument("--layer", type=int, required=True, help="layer of the vector")
        else:
            added.add_argument("--layers", type=int, nargs="+", help="0-based layers (default all)")
            added.add_argument("--controls", action="store_true", help="run the controls at every layer too")
        added.add_argument("--metric", choices=("letter", "letter_published", "logprob"), help="default: by the pairs")
        added.add_argument("--multipliers", type=float, nargs="+", default=[-1.0, 0.0, 1.0], help="default -1 0 1")
        added.add_argument(
            "--systems", action="store_true", help="also with the behaviour's positive and negative system prompts"
        )
        added.add_argument(
            "--others",
            type=_named_file,
            nargs="+",
            metavar="NAME=FILE",
            default=[],
            help="other behaviours' vectors, run beside at the same norm as controls",
        )
        added.add_argument(
            "--store", type=Path, help="folder that keeps finished items; an interrupted run goes on there"
        )
        added.add_argument("--save", type=Path, help="write the items' table: .parquet, .json or .csv")
    return parser


def _named_file(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=FILE (sentiment=out/sentiment.safetensors)")
    return name, file
