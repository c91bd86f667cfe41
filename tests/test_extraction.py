"""Against the paper's procedure in plain Hugging Face hooks; and what must not matter, does not."""

import pytest
import torch
from conftest import as_lens, relative_error, tiny_llama

import caa_lens as caa
from caa_lens.extraction import iterate_activations
from caa_lens.extraction_plan import plan_extraction
from caa_lens.models import run

MULTIPLE_CHOICE = [
    ("Is it?\n\nChoices:\n(A) Yes\n(B) No", "(A)", "(B)"),
    (
        "Would you like to go on and on about it, at some length?\n\nChoices:\n(A) I would\n(B) I would not",
        "(B)",
        "(A)",
    ),
    ("Say.\n\nChoices:\n(A) a\n(B) b", "(A)", "(B)"),
]


def paper_vectors(hf_model, tokenizer, pairs, text):
    """Mean over pairs of resid_post at index -2, one prompt at a time, by forward hooks on the decoder layers."""
    sums = [torch.zeros(hf_model.config.hidden_size) for _ in hf_model.model.layers]
    for prompt, positive, negative in pairs:
        for sign, answer in ((1, positive), (-1, negative)):
            seen = []
            handles = [
                layer.register_forward_hook(
                    lambda m, a, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
                )
                for layer in hf_model.model.layers
            ]
            with torch.no_grad():
                hf_model(torch.tensor([tokenizer.encode(text(prompt, answer))]))
            for handle in handles:
                handle.remove()
            for total, out in zip(sums, seen, strict=True):
                total += sign * out.reshape(-1, out.shape[-1])[-2]
    return [total / len(pairs) for total in sums]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (caa.Llama2Chat(), lambda q, a: f"[INST] {q} [/INST] {a}"),
        (caa.Llama2Chat(system_prompt="Sys."), lambda q, a: f"<<SYS>>\nSys.\n<</SYS>>\n\n[INST] {q} [/INST] {a}"),
        (caa.Llama2Base(), lambda q, a: f"Input: {q}\nResponse: {a}"),
    ],
    ids=["chat", "chat-system", "base"],
)
def test_vectors_are_the_papers(llama2_chat, llama_tokenizer, template, text):
    model, hf_model = llama2_chat
    reference = paper_vectors(hf_model, llama_tokenizer, MULTIPLE_CHOICE, text)
    vectors = caa.extract(model, caa.load_pairs(MULTIPLE_CHOICE), template=template, progress=False)
    assert vectors.provenance.read == "answer"
    for layer, expected in enumerate(reference):
        assert relative_error(vectors[layer].tensor, expected) < 1e-5


@pytest.mark.parametrize("read", ["completion_mean", "answer", "last", -4])
def test_batch_order_and_prefix_do_not_matter(model, pairs, read):
    reference = caa.extract(model, pairs, read=read, batch_size=1, share_prefix=False, progress=False).stack()
    shuffled = caa.PairSet(pairs.pairs[::-1])
    for other in (
        caa.extract(model, pairs, read=read, batch_size=1, progress=False),
        caa.extract(model, pairs, read=read, batch_size=3, progress=False),
        caa.extract(model, pairs, read=read, batch_size=5, share_prefix=False, progress=False),
        caa.extract(model, shuffled, read=read, progress=False),
    ):
        assert relative_error(other.stack(), reference) < 1e-5


def test_padding_length_does_not_matter(model, pairs, vectors, monkeypatch):
    pad = caa.extraction.pad

    def generous(rows, **options):
        tokens, mask = pad([*rows, [0] * (max(map(len, rows)) + 7)], **options)
        return tokens[:-1], mask[:-1]

    monkeypatch.setattr("caa_lens.extraction.pad", generous)
    assert relative_error(caa.extract(model, pairs, progress=False).stack(), vectors.stack()) < 1e-5


def test_reads_are_what_they_say(model, pairs):
    """Against TransformerLens' own cache on whole texts."""
    template, tokenizer = caa.ChatTemplate(), model.tokenizer
    expected = {"completion_mean": 0.0, "last": 0.0, "answer": 0.0}
    for pair in pairs:
        both = template.encode_pair(tokenizer, pair)
        for sign, side in ((1, both.positive), (-1, both.negative)):
            _, cache = model.run_with_cache(torch.tensor([side.ids]))
            out = cache["blocks.1.hook_resid_post"].reshape(len(side.ids), -1)
            expected["completion_mean"] += sign * out[side.completion_start :].mean(0) / len(pairs)
            expected["last"] += sign * out[-1] / len(pairs)
            expected["answer"] += sign * out[both.answer] / len(pairs)
    for read, vector in expected.items():
        found = caa.extract(model, pairs, read=read, layers=[1], progress=False)[1].tensor
        assert relative_error(found, vector) < 1e-5


def test_both_classes_agree(byte_tokenizer, pairs):
    pytest.importorskip("transformer_lens.HookedTransformer", reason="TransformerLens 4 has no HookedTransformer")
    found = [
        caa.extract(as_lens(kind, tiny_llama(len(byte_tokenizer)), byte_tokenizer), pairs, progress=False).stack()
        for kind in ("hooked", "bridge")
    ]
    assert relative_error(*found) < 1e-4


def test_the_longest_run_first_and_leave_their_prefix_as_it_is(model, pairs, monkeypatch):
    plan, seen = plan_extraction(model, pairs, batch_size=2), []

    def watch(model, tokens, mask, *, past=None, **options):
        before = None if past is None else past.mask.shape[1]
        result = run(model, tokens, mask, past=past, **options)
        if past is not None:
            seen.append((before, kept_tokens(past)))
        return result

    lengths = [len(plan.encoded[i].positive.ids) for batch in plan.batches for i in batch]
    assert lengths == sorted(lengths, reverse=True)
    monkeypatch.setattr("caa_lens.extraction.run", watch)
    for _ in iterate_activations(model, plan, progress=False):
        pass
    assert seen
    assert all(before == after for before, after in seen)


def kept_tokens(prefix):
    """How many tokens the cache holds of every row."""
    lengths = (
        {entry.past_keys.shape[1] for entry in prefix.cache.entries}
        if hasattr(prefix.cache, "entries")
        else {layer.keys.shape[-2] for layer in prefix.cache.layers}
    )
    return lengths.pop() if len(lengths) == 1 else lengths


def test_weights_hooks_and_config_are_untouched(model, pairs):
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = dict(vars(model.cfg))
    caa.extract(model, pairs, progress=False)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert dict(vars(model.cfg)) == config
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_layers_provenance_and_controls(model, pairs):
    vectors = caa.extract(model, pairs, layers=[-1, 0], progress=False)
    assert vectors.layers == (0, 2)
    made = vectors.provenance
    assert (made.model, made.n_pairs, made.pairs_hash, made.read) == ("tiny", 5, pairs.hash, "completion_mean")
    assert made.template_hash == caa.ChatTemplate().hash
    assert set(made.versions) == {"caa-lens", "transformer-lens", "transformers", "torch"}
    assert set(vectors.controls) == {"shuffled-0", "shuffled-1", "shuffled-2"}
    assert vectors[0].raw_norm == pytest.approx(vectors[0].norm)
    assert vectors[0].residual_norm > 0


def test_under_steer_the_steered_activations_are_read(model, pairs, vectors):
    with caa.steer(model, 2 * vectors[0]):
        inside = caa.extract(model, pairs, progress=False)
    # All completion tokens are steered alike, so at that layer the difference stays; above it does not.
    assert relative_error(inside[0].tensor, vectors[0].tensor) < 1e-4
    assert relative_error(inside[2].tensor, vectors[2].tensor) > 1e-3
    assert inside[0].residual_norm != pytest.approx(vectors[0].residual_norm, rel=1e-3)


def test_store_gives_the_activations_back_and_resumes(model, pairs, tmp_path, monkeypatch):
    reference = caa.extract(model, pairs, batch_size=2, progress=False)
    calls = []
    reader = caa.extraction._Reader.read

    def dying(self, index):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(index)
        return reader(self, index)

    monkeypatch.setattr("caa_lens.extraction._Reader.read", dying)
    with pytest.raises(KeyboardInterrupt):
        caa.extract(model, pairs, batch_size=2, store=tmp_path / "s", progress=False)
    with pytest.raises(caa.InputError, match="1 of 3 shards"):
        caa.load_activations(tmp_path / "s", 1)
    resumed = []
    monkeypatch.setattr("caa_lens.extraction._Reader.read", lambda self, i: resumed.append(i) or reader(self, i))
    again = caa.extract(model, pairs, batch_size=2, store=tmp_path / "s", progress=False)
    assert len(resumed) == 2
    assert torch.equal(again.stack(), reference.stack())
    positive, negative = caa.load_activations(tmp_path / "s", 1)
    assert relative_error((positive - negative).mean(0), reference[1].tensor) < 1e-6
    with pytest.raises(caa.InputError, match="another extraction"):
        caa.extract(model, pairs[:2], batch_size=2, store=tmp_path / "s", progress=False)
    with pytest.raises(caa.InputError, match="not 9"):
        caa.load_activations(tmp_path / "s", 9)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "about.json").write_text("{")
    with pytest.raises(caa.InputError, match="does not say which extraction its folder holds"):
        caa.extract(model, pairs, store=tmp_path / "torn", progress=False)
    with pytest.raises(caa.InputError, match="no stored activations"):
        caa.load_activations(tmp_path / "nowhere", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, "layer 3 is out of range: tiny has layers 0 to 2"),
        ({"layers": []}, "no layer given"),
        ({"read": "first"}, "allowed are 'answer'"),
        ({"read": 400}, "lies outside its"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_bad_options_are_refused_before_the_model_runs(model, pairs, options, message, monkeypatch, unchecked):
    monkeypatch.setattr("caa_lens.extraction.run", lambda *a, **k: pytest.fail("the model was run"))
    with pytest.raises(caa.CaaLensError, match=message):
        caa.extract(model, pairs, **{"progress": False, **options})


def test_bad_pairs_are_refused_before_the_model_runs(model, monkeypatch):
    monkeypatch.setattr("caa_lens.extraction.run", lambda *a, **k: pytest.fail("the model was run"))
    with pytest.raises(caa.InputError, match="exceed the context of 512 tokens"):
        caa.extract(model, caa.load_pairs([("word " * 200, "yes", "no")]), progress=False)
    with pytest.raises(caa.InputError, match="holds no pairs"):
        caa.extract(model, caa.PairSet(()), progress=False)
