"""Two processes do what one does, to the bit; what is stored belongs to no process; one that dies takes the others along."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import two_processes
from conftest import has_hooked, tiny_llama

import caa_lens as caa
from caa_lens import workers
from caa_lens.files import atomic_path

NAMES = ["hooked", "bridge"] if has_hooked() else ["bridge"]
SCRIPT = Path(two_processes.__file__)
LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def launch(launcher, *arguments):
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", *launcher, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes: how a product is cut into threads may change its last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def launched(tmp_path_factory, byte_tokenizer):
    """(folder, what one process gets, its models, output of both launches, their exit codes)."""
    folder = tmp_path_factory.mktemp("workers")
    tiny_llama(len(byte_tokenizer), context=2048).save_pretrained(folder / "tiny")
    byte_tokenizer.save_pretrained(folder / "tiny")
    models = {name: caa.load_model(str(folder / "tiny"), kind=name) for name in NAMES}
    single = {}
    for name, model in models.items():
        stores = folder / f"activations-{name}", folder / f"scores-{name}"
        single[name] = two_processes.work(model, *stores)
        # Of what one process has stored, two find a part.
        (stores[0] / "shard-00001.safetensors").unlink()
        for item in (0, 3):
            (stores[1] / f"item-{item:06d}.json").unlink()
    with (
        launch(ACCELERATE, folder, "together", *NAMES) as first,
        launch(TORCHRUN, folder, "killed", NAMES[-1]) as second,
    ):
        try:
            outputs = [process.communicate(timeout=300)[0] for process in (first, second)]
        finally:
            for process in (first, second):
                process.terminate()  # the launchers end their processes
    return folder, single, models, outputs, [first.returncode, second.returncode]


@pytest.fixture(scope="module")
def together(launched):
    folder, _, _, outputs, codes = launched
    assert codes[0] == 0, outputs[0]
    return [pickle.loads((folder / f"together-{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_get_what_one_gets(launched, together, name):
    single = launched[1][name]
    assert [found["process"] for found in together] == [(0, 2, True, 0), (1, 2, False, 1)]
    for found in together:
        for mine, theirs in zip(found[name]["vectors"], single["vectors"], strict=True):
            assert torch.equal(mine, theirs)
        assert found[name]["norms"] == single["norms"]
        for table in ("sweep", "score", "capability", "loss", "answers", "curve"):
            pd.testing.assert_frame_equal(found[name][table], single[table], check_exact=True)
        # Of a resumed sweep the texts that are left form other batches, which changes the last bits.
        pd.testing.assert_frame_equal(found[name]["resumed"], single["resumed"], atol=1e-5)
    assert together[0][name]["resumed"].equals(together[1][name]["resumed"])


@pytest.mark.parametrize("name", NAMES)
def test_the_batches_are_shared(together, name):
    """Extraction: 1 of 3 batches is not stored. Sweep: 10 texts in 4 batches, then the 4 that are not stored in 2; the score: again
    4 batches. Then 3 questions, as many windows of text as there are, the answers to 3 open questions, and 3 batches for the
    learning curve."""
    mine, theirs = (found[f"batches {name}"] for found in together)
    windows = together[0][name]["loss"]["item"].nunique()
    assert mine + theirs == 1 + 4 + 2 + 4 + 3 + windows + 3 + 3
    assert mine - 4 <= theirs <= mine


def test_a_fresh_store_is_complete(launched, together):
    folder = launched[0]
    for name in NAMES:
        assert len(list((folder / f"scores-{name}").glob("item-*.json"))) == 5
        positive, negative = caa.load_activations(folder / f"activations-{name}", 1)
        vector = launched[1][name]["vectors"][0][1]
        torch.testing.assert_close((positive - negative).mean(0), vector)
    assert not [file for file in folder.rglob("*.tmp*") if "killed" not in str(file)]


def test_a_study_of_two_processes_is_that_of_one(launched, together, tmp_path):
    """Tables, figures and vectors, to the byte."""
    folder, _, models, *_ = launched
    two_processes.study(models[NAMES[-1]], tmp_path)
    alone, shared = (
        {
            file.relative_to(root): file.read_bytes()
            for part in ("sections", "vectors")
            for file in (root / part).rglob("*.*")
        }
        for root in (tmp_path, folder / "study")
    )
    assert len(alone) > 20
    assert alone == shared
    assert (folder / "study" / "report.html").exists()


def test_errors_and_differences_are_everybodys(together):
    mine, theirs = together
    assert mine["fails"].startswith("CaaLensError: process 1 of 2 failed: ZeroDivisionError")
    assert theirs["fails"].startswith("ZeroDivisionError")
    for rank, found in enumerate(together):
        assert "asked for different work" in found["differs"]
        assert found["alone"] == (1, 3 + rank)
        assert found["main"] == "from 0"


def test_the_commands_print_and_write_once(launched, together):
    folder, _, _, (output, _), _ = launched
    assert [found["command"] for found in together] == [0, 0]
    assert output.count("-> ") == 1
    assert output.count("extract formality:   0%") == 1
    assert caa.load_vectors(folder / "command.safetensors").layers == (1,)


def test_a_killed_process_loses_only_what_it_had_in_hand(launched):
    """Both end (or the launch would have run out of time), the finished items stay, and one process goes on."""
    folder, _, models, outputs, codes = launched
    assert codes[1] != 0, outputs[1]
    assert not list(folder.glob("killed-*.pickle"))
    stored = sorted(file.name for file in (folder / "killed").glob("item-*.json"))
    assert 0 < len(stored) < 5
    model = models[NAMES[-1]]
    vectors = caa.extract(model, two_processes.PAIRS, progress=False)
    expected = two_processes.sweep(model, vectors).items
    read = [(folder / "killed" / name).stat().st_mtime_ns for name in stored]
    found = two_processes.sweep(model, vectors, folder / "killed").items
    pd.testing.assert_frame_equal(found, expected, atol=1e-5)
    assert read == [(folder / "killed" / name).stat().st_mtime_ns for name in stored]


def test_one_process_is_the_plain_case():
    """Nothing is exchanged, nothing is run ahead."""
    ran = []
    results = workers.shared_map(lambda x: ran.append(x) or 2 * x, [1, 2, 3])
    assert next(results) == 2
    assert ran == [1]
    assert list(results) == [4, 6]
    assert (workers.count(), workers.rank(), workers.is_main(), workers.local_rank()) == (1, 0, True, 0)
    assert workers.gather(lambda: "mine") == ["mine"]
    assert workers.on_main(lambda: "mine") == "mine"
    workers.require_same("digest", "work")


def test_accelerates_single_process_is_noticed(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` announces two processes and starts one."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert workers.count() == 1
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.warns(caa.CaaLensWarning, match="--multi_gpu"):
        assert workers.count() == 1


def test_several_processes_may_write_one_file(tmp_path):
    """Whatever the process ids, which are alike on different machines."""
    with atomic_path(tmp_path / "file") as mine:
        mine.write_text("mine")
        with atomic_path(tmp_path / "file") as theirs:
            theirs.write_text("theirs")
        assert (tmp_path / "file").read_text() == "theirs"
    assert (tmp_path / "file").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
