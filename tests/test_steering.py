"""Positions, padding, caches, batches, contexts, hook order: steering is exact however the model is run."""

import pytest
import torch
from conftest import relative_error

import caa_lens as caa
from caa_lens.models import device_of, pad, run
from caa_lens.positions import known_prompts

OPERATORS = {
    "add": caa.add,
    "ablate": caa.ablate,
    "clamp": caa.clamp,
    "gate": caa.gate(caa.add, 0.0),
}
POSITIONS = {
    "after_instruction": "after_instruction",
    "generated": "generated",
    "last": "last",
    "all": "all",
    "slice": slice(4, 20),
    "tail": slice(-3, None),
    "function": lambda ids: ids % 3 == 0,
}
QUESTIONS = ["Hi?", "What is the meaning of all this?", "Where did you go to yesterday?"]


def prompts(model, questions=QUESTIONS, completion=None):
    return [caa.ChatTemplate().encode(model.tokenizer, q, completion) for q in questions]


def whole_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))[0]


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_cached_uncached_alone_and_padded_agree(model, vectors, positions, operator):
    """Each row's tokens run whole and alone = prompt then one token at a time, in left- and right-padded batches."""
    v = 2 * vectors[1]
    rows = prompts(model, completion="Fine, thanks.")
    ends = [row.instruction_end for row in rows]
    with caa.steer(model, v, positions=positions, operator=operator):
        alone = []
        for row in rows:
            with known_prompts([row.instruction_end]):
                alone.append(whole_logits(model, row.ids))
        for row, expected in zip(rows, alone, strict=True):
            found, past = [], None
            with known_prompts([row.instruction_end]), torch.no_grad():
                steps = [row.ids[: row.completion_start], *([i] for i in row.ids[row.completion_start :])]
                for step in steps:
                    tokens = torch.tensor([step])
                    logits, past = run(model, tokens, torch.ones_like(tokens), past=past, grow=True, logits=len(step))
                    found.append(logits[0])
            torch.testing.assert_close(torch.cat(found), expected, atol=2e-4, rtol=1e-4)
        for side in ("left", "right"):
            tokens, mask = pad([row.ids for row in rows], side=side, device=device_of(model))
            with known_prompts(ends), torch.no_grad():
                logits, _ = run(model, tokens, mask, logits=tokens.shape[1])
            for index, expected in enumerate(alone):
                torch.testing.assert_close(logits[index, mask[index].bool()], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", [*POSITIONS.values(), torch.arange(60) > 30], ids=[*POSITIONS, "mask"])
def test_only_the_asked_positions_change_and_never_padding(model, vectors, positions):
    rows = prompts(model, completion="Yes.")
    tokens, mask = pad([row.ids for row in rows], side="left", device=device_of(model))
    if isinstance(positions, torch.Tensor):
        positions = positions[-tokens.shape[1] :]

    def residual():
        seen = {}
        hook = ("blocks.0.hook_resid_post", lambda x, hook: seen.update(x=x.clone()))
        with model.hooks(fwd_hooks=[hook]), known_prompts([row.instruction_end for row in rows]), torch.no_grad():
            run(model, tokens, mask)
        return seen["x"]

    before = residual()
    with caa.steer(model, vectors[0], positions=positions):
        after = residual()
    changed = (before != after).any(-1)
    assert not changed[~mask.bool()].any()
    for index, row in enumerate(rows):
        count, end = len(row.ids), row.instruction_end
        position = torch.arange(count)
        expected = {
            "after_instruction": position >= end,
            "generated": position > end,
            "last": position == end,
            "all": position >= 0,
        }.get(positions if isinstance(positions, str) else "")
        if isinstance(positions, slice):
            expected = torch.zeros(count, dtype=torch.bool)
            stop = count if positions.stop is None else positions.stop
            expected[(positions.start if positions.start >= 0 else end + 1 + positions.start) : stop] = True
        elif isinstance(positions, torch.Tensor):
            expected = positions[-count:]
        elif expected is None:
            expected = torch.tensor(row.ids) % 3 == 0
        assert torch.equal(changed[index, -count:], expected)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_zero_vectors_steer_exactly_nothing(model, vectors, positions, operator):
    ids = prompts(model)[1].ids
    plain = whole_logits(model, ids)
    for zero in (0 * vectors[1], vectors[1] - vectors[1]):
        with caa.steer(model, zero, positions=positions, operator=operator):
            assert torch.equal(whole_logits(model, ids), plain)


def test_nothing_is_left_behind(model, vectors):
    ids = prompts(model)[1].ids
    plain, weights = whole_logits(model, ids), {n: p.clone() for n, p in model.named_parameters()}
    config = dict(vars(model.cfg))
    watchers = sum(len(m._forward_pre_hooks) for m in model.modules())
    seen = []
    own = ("blocks.1.hook_resid_post", lambda x, hook: seen.append(1))

    def crash():
        with caa.steer(model, vectors), caa.steer(model, [2 * vectors[0], vectors[2]]):
            assert not torch.equal(whole_logits(model, ids), plain)
            raise RuntimeError("user code")

    with model.hooks(fwd_hooks=[own]):
        with pytest.raises(RuntimeError, match="user code"):
            crash()
        count = len(seen)
        assert torch.equal(whole_logits(model, ids), plain)
        assert len(seen) == count + 1  # the user's own hook is still there
    assert torch.equal(whole_logits(model, ids), plain)
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())
    assert dict(vars(model.cfg)) == config
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == watchers


def test_nested_contexts_and_lists_add_up(model, vectors):
    ids = prompts(model)[0].ids
    with caa.steer(model, vectors[1]), caa.steer(model, 2 * vectors[1]):
        nested = whole_logits(model, ids)
    with caa.steer(model, 3 * vectors[1]):
        torch.testing.assert_close(whole_logits(model, ids), nested, atol=1e-4, rtol=1e-4)
    with caa.steer(model, vectors):
        together = whole_logits(model, ids)
    with caa.steer(model, list(vectors.values())):
        assert torch.equal(whole_logits(model, ids), together)


def test_steered_logits_are_the_papers(llama2_chat, llama_tokenizer):
    """A plain Hugging Face hook that adds the vector from the final "]" of [/INST] on."""
    model, hf_model = llama2_chat
    pairs = caa.load_pairs([("Is it?\n(A) Yes\n(B) No", "(A)", "(B)"), ("Go?\n(A) a\n(B) b", "(B)", "(A)")])
    for template, text in (
        (caa.Llama2Chat(), "[INST] Will you? [/INST] ("),
        (caa.Llama2Base(), "Input: Will you?\nResponse: ("),
    ):
        vectors = caa.extract(model, pairs, template=template, progress=False)
        ids = llama_tokenizer.encode(text)
        end = template.find_instruction_end(llama_tokenizer, ids)
        for layer in range(3):
            direction = 1.5 * vectors[layer].tensor

            def add_hook(module, args, out, end=end, direction=direction):
                hidden = out[0] if isinstance(out, tuple) else out
                hidden = hidden.clone()
                hidden[:, end:] += direction
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

            handle = hf_model.model.layers[layer].register_forward_hook(add_hook)
            with torch.no_grad():
                expected = hf_model(torch.tensor([ids])).logits[0, -1]
            handle.remove()
            with caa.steer(model, 1.5 * vectors[layer], template=template):
                found = whole_logits(model, ids)[-1]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_hook_order_is_order_of_entry(model, vectors):
    ids, seen = prompts(model)[0].ids, {}

    def watch(name):
        return (vectors[1].hook_name, lambda x, hook: seen.update({name: x.clone()}))

    with model.hooks(fwd_hooks=[watch("before")]), caa.steer(model, vectors[1], positions="all"):
        with model.hooks(fwd_hooks=[watch("after")]), torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([ids]))
            model.run_with_hooks(torch.tensor([ids]), fwd_hooks=[watch("run_with_hooks")])
    torch.testing.assert_close(seen["after"], seen["before"] + vectors[1].tensor)
    assert torch.equal(seen["after"], cache[vectors[1].hook_name].reshape(seen["after"].shape))
    assert torch.equal(seen["run_with_hooks"], seen["after"])


def test_reset_hooks_inside_is_survived_and_reported(model, vectors):
    ids = prompts(model)[0].ids
    with caa.steer(model, vectors[1]):
        steered = whole_logits(model, ids)
        model.reset_hooks()
        with pytest.warns(caa.CaaLensWarning, match="removed the steering hooks"):
            assert torch.equal(whole_logits(model, ids), steered)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_hooks_removed_at_one_layer_are_put_back_once(model, vectors):
    ids = prompts(model)[0].ids
    with caa.steer(model, vectors):
        steered = whole_logits(model, ids)
        model.hook_dict[vectors[1].hook_name].remove_hooks("fwd")
        with pytest.warns(caa.CaaLensWarning, match="removed the steering hooks"):
            assert torch.equal(whole_logits(model, ids), steered)


def test_plain_hooks_equal_the_context(model, vectors):
    row = prompts(model)[1]
    tokens = torch.tensor([row.ids])
    for positions in POSITIONS.values():
        hooks = caa.steering_hooks(model, vectors, positions=positions, tokens=tokens)
        with caa.steer(model, vectors, positions=positions), torch.no_grad():
            expected = model(tokens)
        with torch.no_grad():
            for _ in range(2):  # the same hooks serve a second run
                assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), expected)
    hooks = caa.steering_hooks(model, vectors[1], positions="all")
    with caa.steer(model, vectors[1], positions="all"), torch.no_grad():
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), model(tokens)) is False
    with pytest.raises(caa.InputError, match="depends on the prompt, which plain hooks cannot see"):
        caa.steering_hooks(model, vectors[1])
    with pytest.raises(caa.InputError, match="occurs 0 times in the tokens"):
        caa.steering_hooks(model, vectors[1], tokens=tokens[:, :5])


def test_plain_hooks_take_a_second_pass_of_one_token_for_a_continuation(model, vectors):
    """They cannot tell it from the prompt again, as `steer` can; the docstring says so."""
    prompt, plain = torch.tensor([[9]]), model(torch.tensor([[9]]))
    steered = model.run_with_hooks(prompt, fwd_hooks=caa.steering_hooks(model, vectors[0], positions="all"))
    hooks = caa.steering_hooks(model, vectors[0], positions="last", tokens=prompt)
    torch.testing.assert_close(model.run_with_hooks(prompt, fwd_hooks=hooks), steered)
    torch.testing.assert_close(model.run_with_hooks(prompt, fwd_hooks=hooks), plain)
    again = caa.steering_hooks(model, vectors[0], positions="last", tokens=prompt)
    torch.testing.assert_close(model.run_with_hooks(prompt, fwd_hooks=again), steered)
    with caa.steer(model, vectors[0], positions="last"):
        for _ in range(2):
            torch.testing.assert_close(model(prompt), steered)


def test_plain_hooks_follow_a_cached_continuation(model, vectors):
    row = prompts(model, completion="Well.")[1]
    prompt, rest = row.ids[: row.completion_start], row.ids[row.completion_start :]
    with caa.steer(model, vectors[0]), known_prompts([row.instruction_end]):
        expected = whole_logits(model, row.ids)[-1]
    hooks = caa.steering_hooks(model, vectors[0], tokens=torch.tensor([prompt]))
    past = None
    with model.hooks(fwd_hooks=hooks), torch.no_grad():
        for step in (prompt, *([i] for i in rest)):
            tokens = torch.tensor([step])
            logits, past = run(model, tokens, torch.ones_like(tokens), past=past, grow=True, logits=1)
    torch.testing.assert_close(logits[0, -1], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_the_models_own_generate_is_steered_alike(model, vectors, cache):
    """TransformerLens' generate sees the prompt once and then single tokens; positions follow."""
    row = prompts(model)[1]
    with caa.steer(model, 3 * vectors[1]):
        ours = caa.generate(model, QUESTIONS[1], max_new_tokens=6)
        out = model.generate(
            torch.tensor([row.ids]),
            max_new_tokens=6,
            do_sample=False,
            use_past_kv_cache=cache,
            stop_at_eos=False,
            verbose=False,
            return_type="tokens",
        )
    theirs = model.tokenizer.decode(out[0, len(row.ids) :], skip_special_tokens=True).strip()
    assert ours
    assert theirs.startswith(ours)


def test_generate_in_batches_equals_alone(model, vectors):
    with caa.steer(model, 2 * vectors[1]):
        together = caa.generate(model, QUESTIONS, max_new_tokens=8)
        assert together == [caa.generate(model, q, max_new_tokens=8) for q in QUESTIONS]
        assert together == caa.generate(model, QUESTIONS, max_new_tokens=8, batch_size=2)
        sampled = caa.generate(model, QUESTIONS, max_new_tokens=8, temperature=1.0, top_k=50, top_p=0.9, seed=3)
        assert sampled == caa.generate(
            model, QUESTIONS, max_new_tokens=8, temperature=1.0, top_k=50, top_p=0.9, seed=3, batch_size=1
        )
        assert sampled != caa.generate(model, QUESTIONS, max_new_tokens=8, temperature=1.0, seed=4)
    assert together != caa.generate(model, QUESTIONS, max_new_tokens=8)


def test_generate_equals_uncached_greedy_decoding(model, vectors):
    row = prompts(model)[2]
    ids = list(row.ids)
    with caa.steer(model, 2 * vectors[1]), known_prompts([row.instruction_end]):
        for _ in range(6):
            ids.append(int(whole_logits(model, ids)[-1].argmax()))
    stops = caa.ChatTemplate().stop_ids(model.tokenizer)
    answer = ids[len(row.ids) :]
    answer = answer[: next((i for i, token in enumerate(answer) if token in stops), len(answer))]
    with caa.steer(model, 2 * vectors[1]):
        assert (
            caa.generate(model, QUESTIONS[2], max_new_tokens=6)
            == model.tokenizer.decode(answer, skip_special_tokens=True).strip()
        )


def test_generate_streams_whole_pieces_and_takes_conversations(model, capsys):
    pieces = []
    answer = caa.generate(model, "Hi?", max_new_tokens=10, stream=pieces.append)
    assert answer.startswith("".join(pieces).strip()[:5])
    caa.generate(model, "Hi?", max_new_tokens=10, stream=True)
    assert capsys.readouterr().out == "".join(pieces)
    turns = [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Well?"},
    ]
    one = caa.generate(model, turns, max_new_tokens=5)
    assert [one] == caa.generate(model, [turns], max_new_tokens=5)


def test_several_turns_are_steered_from_the_last_instruction_on(model, vectors):
    turns = [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Well?"},
    ]
    row = caa.ChatTemplate().encode(model.tokenizer, turns)
    with caa.steer(model, vectors[1]):
        caa.generate(model, turns, max_new_tokens=3)
        with pytest.raises(caa.InputError, match="occurs 2 times in the tokens"):
            whole_logits(model, row.ids)


def test_one_strength_a_row(model, vectors):
    expected = []
    for strength in (-1.0, 0.0, 2.0):
        with caa.steer(model, strength * vectors[1]):
            expected.append(caa.generate(model, QUESTIONS[0], max_new_tokens=8))
    with caa.steer(model, vectors[1], strength=torch.tensor([-1.0, 0.0, 2.0])):
        assert caa.generate(model, [QUESTIONS[0]] * 3, max_new_tokens=8) == expected
        with pytest.raises(caa.InputError, match="3 entries, one a row"):
            caa.generate(model, QUESTIONS[0])


def test_a_foreign_cache_is_refused_not_guessed(model, vectors):
    row = prompts(model)[1]
    tokens = torch.tensor([row.ids])
    with torch.no_grad():
        _, past = run(model, tokens, torch.ones_like(tokens), grow=True)
    one = tokens[:, :1]
    with caa.steer(model, vectors[1]), pytest.raises(caa.InputError, match="was not filled inside steer"):
        run(model, one, torch.ones_like(one), past=past)
    with caa.steer(model, vectors[1], positions="all"), torch.no_grad():
        run(model, one, torch.ones_like(one), past=past)


def test_show_positions_marks_the_steered_tokens(model, capsys):
    caa.show_positions(model, "Hi?", completion="Yes")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 of ")
    assert [line.split("'")[1] for line in lines if "  >  " in line] == [r"\n", "Y", "e", "s"]


@pytest.mark.parametrize(
    ("steering", "options", "message"),
    [
        (lambda v: [], {}, "no vector to steer with"),
        (lambda v: torch.zeros(48), {}, "takes a SteeringVector"),
        (lambda v: v[1].retarget("other"), {}, r"made on other, this is tiny.*retarget\('tiny'\)"),
        (
            lambda v: caa.SteeringVector(torch.ones(8), 0, caa.Provenance("tiny", n_layers=3, d_model=8)),
            {},
            "width 8, tiny has d_model 48",
        ),
        (
            lambda v: caa.SteeringVector(torch.ones(48), 7, caa.Provenance("tiny", n_layers=9, d_model=48)),
            {},
            "layer 7 is out of range",
        ),
        (lambda v: v[1], {"positions": slice(0, 9, 2)}, "slice of step 1"),
        (lambda v: v[1], {"positions": "before"}, "'after_instruction'"),
    ],
)
def test_bad_steering_is_refused_on_entry(model, vectors, steering, options, message, unchecked):
    with pytest.raises(caa.CaaLensError, match=message), caa.steer(model, steering(vectors), **options):
        pass
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "no prompt to generate from"),
        ("x", {"max_new_tokens": 0}, "at least 1"),
        ("x", {"temperature": -1.0}, "cannot be negative"),
        ("x", {"top_k": 5}, "temperature above 0"),
        (["x", "y"], {"stream": True}, "stream works for one prompt"),
        ("x" * 600, {}, "exceed the context of 512"),
    ],
)
def test_bad_generation_is_refused(model, given, options, message):
    with pytest.raises(caa.InputError, match=message):
        caa.generate(model, given, **options)


def test_mask_of_another_shape_and_a_bad_function(model, vectors, unchecked):
    ids = prompts(model)[0].ids
    with caa.steer(model, vectors[1], positions=torch.ones(3, dtype=torch.bool)):
        with pytest.raises(caa.InputError, match=r"position mask has shape \[3\]"):
            whole_logits(model, ids)
    with (
        caa.steer(model, vectors[1], positions=lambda ids: ids),
        pytest.raises(caa.InputError, match="one boolean per id"),
    ):
        whole_logits(model, ids)


def test_half_precision_residuals_are_not_promoted(model, vectors):
    """A hook on bf16 activations gives bf16 back."""
    _, hook = caa.steering_hooks(model, vectors[1], positions="all")[0]
    x = torch.randn(2, 3, 48, dtype=torch.bfloat16)
    assert hook(x, hook=None).dtype == torch.bfloat16


def test_models_with_learned_positions_and_layer_norm(gpt2, pairs):
    vectors = caa.extract(gpt2, pairs, progress=False)
    assert (
        relative_error(
            caa.extract(gpt2, pairs, share_prefix=False, batch_size=1, progress=False).stack(), vectors.stack()
        )
        < 1e-5
    )
    with caa.steer(gpt2, 2 * vectors[1]):
        assert caa.generate(gpt2, QUESTIONS, max_new_tokens=5) == [
            caa.generate(gpt2, q, max_new_tokens=5) for q in QUESTIONS
        ]
    assert vectors.provenance.basis == "raw"


@pytest.mark.parametrize("positions", ["after_instruction", "last", slice(-2, None), "generated"], ids=str)
def test_right_padding_without_a_mask_is_not_counted(model, vectors, positions):
    """TransformerLens makes no mask for it: the shorter row's own last tokens are steered, and what every row ends in is text."""
    rows = [caa.ChatTemplate().encode(model.tokenizer, text).ids for text in ("Hi.", "What is the time, if I may ask?")]
    pad_id = model.tokenizer.pad_token_id
    for ending in ((), (pad_id,)):
        texts = [[*row, *ending] for row in rows]
        width = max(map(len, texts))
        batch = torch.tensor([text + [pad_id] * (width - len(text)) for text in texts])
        with torch.no_grad(), caa.steer(model, 3 * vectors[1], positions=positions):
            together = model(batch)
            for row, text in zip(together, texts, strict=True):
                torch.testing.assert_close(row[: len(text)], model(torch.tensor([text]))[0], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*RoPE was NOT applied")  # of a bridge's block by itself, with or without steering
def test_a_pass_that_begins_at_a_later_block_is_not_steered_by_a_guess(model, vectors):
    v, tokens = vectors[1], prompt_tokens(model, "Is it?")
    other = prompt_tokens(model, "Is he?")  # as long
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        stream = cache["blocks.0.hook_resid_post"].reshape(1, tokens.shape[1], -1)
        unsteered = as_tensor(model.blocks[1](stream))
        with caa.steer(model, v):
            for before in (
                lambda: None,
                lambda: model(tokens),
                lambda: model(other),
                lambda: model(tokens.repeat(2, 1)),
            ):
                before()
                with pytest.raises(caa.InputError, match="began at a later block"):
                    model.blocks[1](stream)
        with caa.steer(model, v, positions="all"):
            torch.testing.assert_close(as_tensor(model.blocks[1](stream)), unsteered + v.tensor)
            model.reset_hooks()
            with pytest.warns(caa.CaaLensWarning, match="reset_hooks"):
                torch.testing.assert_close(as_tensor(model.blocks[1](stream)), unsteered + v.tensor)


def test_a_pass_in_two_parts_is_steered_as_one(model, vectors, kind):
    if kind == "bridge":
        pytest.skip("a bridge takes no start_at_layer")
    tokens = prompt_tokens(model, "Is it?")
    with torch.no_grad(), caa.steer(model, vectors[1]):
        whole = model(tokens)
        torch.testing.assert_close(model(model(tokens, stop_at_layer=1), start_at_layer=1), whole)


def as_tensor(output):
    return output[0] if isinstance(output, tuple) else output


def prompt_tokens(model, text):
    return torch.tensor([caa.ChatTemplate().encode(model.tokenizer, text).ids])


def test_plain_hooks_of_another_batch_are_refused(model, vectors):
    tokens = prompt_tokens(model, "Is it?")
    hooks = caa.steering_hooks(model, vectors[1], tokens=tokens.repeat(2, 1))
    with pytest.raises(caa.InputError, match="2 rows of tokens saw a batch of 1"):
        model.run_with_hooks(tokens, fwd_hooks=hooks)
