"""Each command on a tiny local model: real files in, real files out, errors in one line."""

import pandas as pd
import pytest
from conftest import tiny_llama

import caa_lens as caa
from caa_lens.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer):
    folder = tmp_path_factory.mktemp("cli")
    tiny_llama(len(byte_tokenizer), context=2048).save_pretrained(folder / "tiny")
    byte_tokenizer.save_pretrained(folder / "tiny")
    return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr("caa_lens.commands.console.width", 200, raising=False)


def run(folder, *arguments):
    return main([arguments[0], "--model", str(folder / "tiny"), *map(str, arguments[1:])])


def test_extract_generate_score_sweep(folder, capsys):
    vectors = folder / "v.safetensors"
    assert run(folder, "extract", "--pairs", "formality", "--out", vectors, "--layers", 0, 1) == 0
    assert caa.load_vectors(vectors).layers == (0, 1)
    assert "70 pairs (30 held out" in capsys.readouterr().out
    assert (
        run(
            folder, "generate", "Hi?", "--vectors", vectors, "--layer", 1, "--multipliers", -1, 1, "--max-new-tokens", 4
        )
        == 0
    )
    assert "+1" in capsys.readouterr().out
    assert run(folder, "score", "--vectors", vectors, "--layer", 1, "--multipliers", -1, 1) == 0
    out = capsys.readouterr().out
    assert "random-0" in out
    assert "nats per unit of multiplier" in out
    table = folder / "t.csv"
    assert (
        run(folder, "sweep", "--vectors", vectors, "--multipliers", 0, 1, "--save", table, "--store", folder / "s") == 0
    )
    assert table.read_text().startswith("item,key,vector,layer")


def test_a_table_that_cannot_be_saved_loses_nothing(folder, capsys, monkeypatch):
    vectors = folder / "saved.safetensors"
    assert run(folder, "extract", "--pairs", "formality", "--out", vectors, "--layers", 1) == 0
    asked = ("--vectors", vectors, "--layers", 1, "--held-out", 3, "--save")
    with monkeypatch.context() as patched:
        patched.setattr(caa, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
        assert run(folder, "sweep", *asked, folder / "t.xlsx") == 1
        assert "t.xlsx: allowed suffixes are .parquet, .json and .csv" in capsys.readouterr().err
        assert run(folder, "sweep", *asked, vectors / "t.csv") == 1
        assert "saved.safetensors is a file, not a folder" in capsys.readouterr().err

    def full(self, path):
        raise caa.InputError("the disk is full")

    monkeypatch.setattr(caa.SweepResult, "save", full)
    assert run(folder, "sweep", *asked, folder / "t.csv") == 1
    assert "nats per token" in capsys.readouterr().out


def test_other_behaviours_and_system_prompts(folder, capsys):
    tone, mood = folder / "tone.safetensors", folder / "mood.safetensors"
    for pairs, out in (("formality", tone), ("sentiment", mood)):
        assert run(folder, "extract", "--pairs", pairs, "--out", out, "--layers", 1) == 0
    table = folder / "others.csv"
    options = ("--multipliers", 0, 1, "--others", f"mood={mood}", "--save", table)
    assert run(folder, "sweep", "--vectors", tone, "--held-out", 5, *options) == 0
    assert set(pd.read_csv(table)["vector"]) == {"vector", "mood"}
    assert run(folder, "score", "--vectors", tone, "--layer", 1, "--held-out", 5, *options) == 0
    assert {"vector", "random-0", "shuffled-0", "mood"} <= set(pd.read_csv(table)["vector"])
    assert "mood" in capsys.readouterr().out
    assert run(folder, "sweep", "--vectors", tone, "--held-out", 5, *options, "--systems") == 0
    assert set(pd.read_csv(table)["system"]) == {"none", "positive", "negative"}
    assert "negative: mood" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run(folder, "sweep", "--vectors", tone, "--others", mood)
    assert "NAME=FILE" in capsys.readouterr().err


def test_project(folder, capsys):
    vectors, page = folder / "p.safetensors", folder / "p.html"
    assert run(folder, "extract", "--pairs", "formality", "--out", vectors, "--layers", 0, 1, 2) == 0
    capsys.readouterr()
    options = ("--vectors", vectors, "--measure", "component")
    assert run(folder, "project", "--text", "[b]Hi?", "--generate", 4, "--multiplier", 2, "--html", page, *options) == 0
    out = capsys.readouterr().out
    assert "layer 1, x · v / |v|²" in out
    assert "steered: 2 * formality at layer 1, after_instruction" in out
    assert "[b]Hi?" in out
    assert "<|im_start|>" in out
    assert "steered: 2 * formality" in page.read_text(encoding="utf-8")
    assert run(folder, "project", "--text", "[b]Hi?", "--plain", "--layer", 2, *options) == 0
    out = capsys.readouterr().out
    assert "layer 2" in out
    assert "<|im_start|>" not in out
    assert run(folder, "project", "--text", "Hi?", "--layer", 5, *options) == 1
    assert "no vector for layer 5" in capsys.readouterr().err


def test_demo(folder, capsys):
    assert run(folder, "demo", "--out", folder / "out", "--layer", 1) == 0
    out = capsys.readouterr().out
    for text in ("|v| / |residual|", "random-0", "shuffled-0", "Greedy answers", "Try next"):
        assert text in out
    assert (folder / "out" / "formality.safetensors").exists()


def test_errors_are_one_line_on_stderr(folder, capsys):
    assert run(folder, "score", "--vectors", folder / "none.safetensors", "--layer", 0) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("caa-lens: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("command", ["demo", "extract", "generate", "project", "convert", "score", "sweep"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"example:\n  caa-lens {command}" in capsys.readouterr().out
