"""Fine-tuning: the loss on the right tokens, seeded, resumable, and a model that scores, steers and loads like any other."""

import json

import pandas as pd
import pytest
import torch
from conftest import as_lens, tiny_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import caa_lens as caa
from caa_lens.experiments import finetuning, training
from caa_lens.hooks import template_for
from caa_lens.models import describe
from caa_lens.models.checkpoints import Checkpoint

LETTERS = caa.load_pairs(
    [
        ("Is it?\n\nChoices:\n(A) Yes\n(B) No", "(A)", "(B)"),
        ("Would you?\n\nChoices:\n(A) Ay\n(B) Nay", "(B)", "(A)"),
        ("Say.\n\nChoices:\n(A) a\n(B) b", "(B)", "(A)"),
    ],
    name="letters",
)
QUICK = {"epochs": 2, "batch_size": 2, "rank": 4, "learning_rate": 1e-2, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory, byte_tokenizer):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama(len(byte_tokenizer)).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def weights(path):
    return load_file(path / "model.safetensors")


def same_weights(a, b):
    a, b = weights(a.path), weights(b.path)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_the_score_moves_as_asked_and_is_that_of_the_loaded_model(base, pairs, held_out, kind, method, side, tmp_path):
    options = {**QUICK, "epochs": 6}  # for five pairs to tell, the move has to be large
    result = caa.finetune(base, pairs, folder=tmp_path, side=side, method=method, held_out=held_out, **options)
    table = result.to_pandas().set_index(["pairs", "measure"])
    for name in ("train", "held_out"):
        row = table.loc[name, "value"]
        moved = row["change_low"] if side == "positive" else -row["change_high"]
        assert moved > 0
        assert row["after"] - row["before"] == pytest.approx(row["change"])
    assert result.verdict().count("MOVED as asked") == 2
    assert result.train_accuracy.after == 1.0
    model = caa.load_model(result.path, kind=kind)
    assert describe(model).name == result.name
    plain = caa.load_model(base, kind=kind)
    held = result.items[result.items["pairs"] == "held_out"]
    for when, loaded in (("before", plain), ("after", model)):
        items = held[held["when"] == when]
        expected = caa.score(loaded, held_out, progress=False).items
        for column in ("value", "positive", "negative"):
            assert items[column].to_numpy() == pytest.approx(expected[column].to_numpy(), abs=1e-4)
    assert result.held_out_accuracy.after == items["accuracy"].mean()


@pytest.mark.parametrize(("loss", "examples"), [("answer", LETTERS), ("completion", None), (None, LETTERS)])
def test_the_loss_is_on_the_tokens_asked(base, pairs, byte_tokenizer, loss, examples, tmp_path):
    """The first step's loss against the plain softmax of the untouched model, in the template that extraction writes."""
    examples = examples or pairs
    options = {**QUICK, "batch_size": 16, "epochs": 1}
    result = caa.finetune(base, examples, folder=tmp_path, method="full", loss=loss, **options)
    hf_model, expected = tiny_llama(len(byte_tokenizer)), []
    for pair in examples:
        both = caa.ChatTemplate().encode_pair(byte_tokenizer, pair)
        ids = torch.tensor([both.positive.ids])
        with torch.no_grad():
            logprobs = hf_model(ids).logits[0].log_softmax(-1)
        counted = both.positive.spans["completion"] if examples is pairs else [both.answer]
        expected.append(sum(float(logprobs[i - 1, ids[0, i]]) for i in counted) / len(counted))
    assert result.log["loss"][0] == pytest.approx(-sum(expected) / len(expected), abs=1e-4)
    assert result.provenance["loss"] == ("completion" if examples is pairs else "answer")


def test_lettered_pairs_are_scored_as_letters(base, kind, tmp_path):
    """And a model tuned on two thirds of the questions keeps its balanced score."""
    result = caa.finetune(base, LETTERS[:2], folder=tmp_path, held_out=LETTERS[2:], **QUICK)
    items = result.items[result.items["when"] == "after"].reset_index(drop=True)
    model = caa.load_model(result.path, kind=kind)
    for name, examples in (("train", LETTERS[:2]), ("held_out", LETTERS[2:])):
        expected = caa.score(model, examples, progress=False)
        found = items[items["pairs"] == name]
        for column in ("value", "effect", "mass", "preferred"):
            assert found[column].to_numpy() == pytest.approx(expected.items[column].to_numpy(), abs=1e-4)
        assert (found["accuracy"] == found["preferred"]).all()
        row = result.to_pandas().set_index(["pairs", "measure"]).loc[name, "value"]
        assert row["after"] == pytest.approx(expected.to_pandas()["value"][0], abs=1e-4)
    negative = caa.finetune(base, LETTERS[:2], folder=tmp_path / "n", side="negative", **QUICK)
    before = negative.items[negative.items["when"] == "before"]
    assert (before["accuracy"] == 1 - before["preferred"]).all()
    assert negative.held_out_accuracy is None


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_seed_gives_the_same_weights_and_another_gives_others(base, pairs, method, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    runs = [
        caa.finetune(base, pairs, folder=tmp_path / str(i), method=method, **QUICK, seed=seed)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(torch.rand(3), expected)  # the caller's own random numbers
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])
    assert runs[0].name == runs[1].name != runs[2].name
    pd.testing.assert_frame_equal(runs[0].log, runs[1].log)


def dying(monkeypatch, owner, name, at):
    """`owner.name` raises at its call number `at`, once."""
    count, real = [0], getattr(owner, name)

    def call(*args, **kwargs):
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("method", "owner", "name", "at"),
    [
        ("lora", torch.nn.utils, "clip_grad_norm_", 5),
        ("full", torch.nn.utils, "clip_grad_norm_", 5),
        ("lora", Checkpoint, "save", 1),
        ("lora", finetuning._Run, "finish", 1),
    ],
    ids=["lora", "full", "saving", "finishing"],
)
def test_killed_and_resumed_is_uninterrupted(base, pairs, method, owner, name, at, tmp_path, monkeypatch):
    options = {**QUICK, "method": method, "save_every": 2, "held_out": None}
    expected = caa.finetune(base, pairs, folder=tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        dying(patched, owner, name, at)
        with pytest.raises(KeyboardInterrupt):
            caa.finetune(base, pairs, folder=tmp_path / "killed", **options)
    left = {file.name for file in (tmp_path / "killed").iterdir()}
    assert {"about.json", "checkpoint.pt"} <= left
    assert not any(file.endswith(".tmp") for file in left)
    with pytest.raises(caa.MissingError, match="holds no finished fine-tuning"):
        caa.FinetuneResult.load(tmp_path / "killed")
    steps = []
    with monkeypatch.context() as patched:
        real = torch.nn.utils.clip_grad_norm_
        patched.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **k: steps.append(1) or real(*a, **k))
        found = caa.finetune(base, pairs, folder=tmp_path / "killed", **options)
    assert len(steps) == (2 if owner is torch.nn.utils else 0)  # 6 steps, 4 of them kept
    assert same_weights(found, expected)
    pd.testing.assert_frame_equal(found.log, expected.log)
    pd.testing.assert_frame_equal(found.items, expected.items)
    assert {file.name for file in found.path.parent.iterdir()} == {"about.json", "result.json", found.name}


def test_a_finished_folder_is_read_and_another_run_refused(base, pairs, held_out, tmp_path, monkeypatch):
    result = caa.finetune(base, pairs, folder=tmp_path, **QUICK)
    monkeypatch.setattr(finetuning, "load_checkpoint", None)  # nothing is loaded
    again = caa.finetune(str(base), pairs, folder=str(tmp_path), **QUICK)
    pd.testing.assert_frame_equal(again.items, result.items)
    pd.testing.assert_frame_equal(again.log, result.log)
    assert (again.path, again.provenance, again.seconds) == (result.path, result.provenance, result.seconds)
    others = [{"side": "negative"}, {"seed": 1}, {"held_out": held_out}, {"epochs": 3}, {"template": caa.Plain()}]
    for changed in others:
        with pytest.raises(caa.InputError, match="holds another run"):
            caa.finetune(base, pairs, folder=tmp_path, **{**QUICK, **changed})
    with pytest.raises(caa.InputError, match="holds another run"):
        caa.finetune(base, pairs[::-1], folder=tmp_path, **QUICK)
    (result.path / "config.json").rename(tmp_path / "config.json")
    result.path.rename(tmp_path / "elsewhere")
    with pytest.raises(caa.MissingError, match="is gone; delete"):
        caa.finetune(base, pairs, folder=tmp_path, **QUICK)


def test_vectors_of_the_base_on_the_tuned_model_and_the_reverse(base, pairs, held_out, kind, tmp_path):
    """On purpose only: the tuned model is another model by name."""
    result = caa.finetune(base, pairs, folder=tmp_path, **QUICK)
    model, tuned = caa.load_model(base, kind=kind), caa.load_model(result.path, kind=kind)
    vectors, own = (caa.extract(each, pairs, progress=False) for each in (model, tuned))
    assert not torch.equal(vectors[1].tensor, own[1].tensor)
    with pytest.raises(caa.InputError, match=r"on purpose with \.retarget\('tiny-llama-tone-positive-lora-"):
        caa.score(tuned, held_out, vectors[1], progress=False)
    for target, transferred in ((tuned, vectors.retarget(result.name)), (model, own.retarget("tiny-llama"))):
        swept = caa.sweep(target, transferred, held_out, layers=[1], progress=False)
        assert swept.effects()["effect"].abs().max() > 0


@pytest.mark.parametrize(
    ("name", "template"),
    [("Llama-2-tiny-chat", caa.Llama2Chat()), ("Llama-2-tiny", caa.Llama2Base())],
    ids=["chat", "base"],
)
def test_a_tuned_llama2_keeps_its_template(llama_tokenizer, name, template, tmp_path):
    """Whatever the pairs and the directory are called, and tuned twice."""
    tiny_llama(32000, grouped=False).save_pretrained(tmp_path / name)
    llama_tokenizer.save_pretrained(tmp_path / name)
    pairs = caa.load_pairs([("Hi.", "Good day.", "Hey man."), ("Why?", "Because.", "Cause.")], name="chat")
    options = {**QUICK, "epochs": 1, "method": "full"}
    once = caa.finetune(tmp_path / name, pairs, folder=tmp_path / "once", **options)
    assert once.provenance["template"] == repr(template)
    twice = caa.finetune(once.path.rename(tmp_path / "my model"), pairs, folder=tmp_path / "twice", **options)
    assert twice.name.startswith("my-model-chat-positive-full-")
    model = caa.load_model(twice.path)
    assert (describe(model).name, describe(model).base) == (twice.name, name)
    assert template_for(model, None) == template


def test_gpt2_with_its_transposed_layers(byte_tokenizer, tmp_path):
    """Adapters on GPT-2's layers and its own dropout; a seed covers both."""
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=len(byte_tokenizer), n_positions=64, n_embd=48, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "tiny-gpt2")
    byte_tokenizer.save_pretrained(tmp_path / "tiny-gpt2")
    pairs = caa.load_pairs([("Hi.", "Good day.", "Hey man."), ("Why?", "Because.", "Cause.")], name="tone")
    options = {**QUICK, "template": caa.Plain(), "epochs": 4}
    runs = [caa.finetune(tmp_path / "tiny-gpt2", pairs, folder=tmp_path / str(i), **options) for i in range(2)]
    assert same_weights(*runs)
    assert "MOVED as asked" in runs[0].verdict()
    tuned = caa.load_model(runs[0].path, kind="bridge")
    expected = caa.score(tuned, pairs, template=caa.Plain(), progress=False).items["value"]
    found = runs[0].items.query("when == 'after'")["value"]
    assert found.to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-4)
    long = caa.load_pairs([("Hi. " * 20, "Good day.", "Hey man.")])
    with pytest.raises(caa.InputError, match="exceed the context of 64 tokens of tiny-gpt2"):
        caa.finetune(tmp_path / "tiny-gpt2", long, folder=tmp_path / "long", **options)
    assert not (tmp_path / "long").exists()


def test_parameters_dtype_log_and_figure(base, pairs, byte_tokenizer, tmp_path):
    lora = caa.finetune(base, pairs, folder=tmp_path / "lora", dtype="bfloat16", **QUICK)
    full = caa.finetune(base, pairs, folder=tmp_path / "full", method="full", **QUICK)
    hf_model = tiny_llama(len(byte_tokenizer))
    linear = [each for each in hf_model.model.modules() if isinstance(each, torch.nn.Linear)]
    assert lora.trainable_parameters == sum(4 * (each.in_features + each.out_features) for each in linear)
    assert full.trainable_parameters == full.parameters == lora.parameters == hf_model.num_parameters()
    assert {each.dtype for each in weights(lora.path).values()} == {torch.bfloat16}
    assert {each.dtype for each in weights(full.path).values()} == {torch.float32}
    assert lora.log["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert lora.log["epoch"].tolist() == [1, 1, 1, 2, 2, 2]
    assert full.log["loss"].iloc[-1] < full.log["loss"].iloc[0]
    assert 0 < full.seconds < 600
    assert json.loads(json.dumps(full.provenance)) == full.provenance
    axis = full.plot().axes[0]
    assert axis.lines[0].get_ydata().tolist() == full.log["loss"].tolist()
    assert "full" in axis.get_title()
    plain = AutoModelForCausalLM.from_pretrained(full.path)  # a directory that transformers alone reads
    assert plain.config.caa_lens_base_model == "tiny-llama"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "both"}, "side='both': allowed are 'positive' and 'negative'"),
        ({"method": "dpo"}, "method='dpo': allowed are 'lora' and 'full'"),
        ({"loss": "prompt"}, "loss='prompt': allowed are 'answer' and 'completion'"),
        ({"metric": "letter"}, "its completions are no answer letters"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be above 0"),
        ({"save_every": 0}, "save_every=0; both must be at least 1"),
        ({"dtype": "float99"}, "allowed are torch dtypes"),
        ({"learning_rate": 1e30}, "the loss of step 2 is nan; lower learning_rate=1e\\+30"),
    ],
)
def test_errors_say_what_to_do(base, pairs, unchecked, options, message, tmp_path):
    with pytest.raises(caa.InputError, match=message):
        caa.finetune(base, pairs, folder=tmp_path / "run", **{**QUICK, **options})


def test_no_pairs_no_peft_no_open_model_no_training_prompt(
    base, pairs, byte_tokenizer, unchecked, tmp_path, monkeypatch
):
    with pytest.raises(caa.InputError, match="holds 0 pairs"):
        caa.finetune(base, pairs[:0], folder=tmp_path, **QUICK)
    with pytest.raises(caa.InputError, match="in the training pairs too"):
        caa.finetune(base, pairs, folder=tmp_path, held_out=pairs[:1], **QUICK)
    model = as_lens("bridge", tiny_llama(len(byte_tokenizer)), byte_tokenizer)
    with pytest.raises(caa.InputError, match="got TransformerBridge: it trains a copy of its own"):
        caa.finetune(model, pairs, folder=tmp_path, **QUICK)
    monkeypatch.setattr(finetuning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(caa.InputError, match=r"needs the peft package: pip install 'caa-lens\[finetune\]'"):
        caa.finetune(base, pairs, folder=tmp_path, **QUICK)
    assert not list(tmp_path.iterdir())


def test_texts_of_unlike_length_do_not_touch_each_other(pairs, byte_tokenizer):
    """Padding and what is kept of the logits change no log-probability, and no gradient."""
    hf_model = tiny_llama(len(byte_tokenizer))
    encoded = [caa.ChatTemplate().encode_pair(byte_tokenizer, pair) for pair in pairs]
    texts = [training.text_to_learn(pair, "negative", "completion") for pair in encoded]

    def gradient(batches):
        hf_model.zero_grad()
        found = [each for batch in batches for each in training.target_logprobs(hf_model, batch)]
        torch.stack([each.mean() for each in found]).mean().backward()
        return torch.cat([each.detach() for each in found]), hf_model.model.layers[0].mlp.up_proj.weight.grad.clone()

    for together, alone in zip(gradient([texts]), gradient([[text] for text in texts]), strict=True):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_embedded_model_learns_and_is_steered_on_top(embedded, tmp_path):
    train, held_out = caa.load_pairs("formality").split(held_out=30, seed=0)
    held_out = held_out[:8]
    options = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "held_out": held_out, "progress": False}
    options |= {"template": caa.Plain()}
    result = caa.finetune("smollm2-135m-instruct", train[:12], folder=tmp_path, side="negative", **options)
    assert "held-out pairs: MOVED as asked" in result.verdict()
    vectors = caa.extract(embedded, train[:12], layers=[14], template=caa.Plain(), progress=False)
    tuned = caa.load_model(result.path)
    steered = caa.sweep(
        tuned, vectors.retarget(result.name), held_out, multipliers=(0, 1), template=caa.Plain(), progress=False
    )
    assert steered.effects()["effect_low"][0] > 0
