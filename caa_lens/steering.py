"""Steering as a context, generation under it, and a look at which tokens it touches.

    with steer(model, 1.5 * v):      # every forward pass inside is steered, however it is made
        generate(model, "How was your weekend?")

`generate` is one loop for both model classes: it writes prompts with the model's template, pads on the left, runs the prompt once
and then one token a step from the KV cache. TransformerLens' own generation masks padding wrongly on some versions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from caa_lens.directions import Operator, add
from caa_lens.errors import InputError
from caa_lens.hooks import Vectors, flatten, steering_hook, template_for
from caa_lens.models import Inputs, Model, describe, device_of, hooks, pad, run, tokenizer_of, watch_inputs
from caa_lens.positions import Positions, PositionTracker, known_prompts, marked_as_steered
from caa_lens.prompts import Conversation, Message, Template


@contextmanager
def steer(
    model: Model,
    vectors: Vectors,
    *,
    positions: Positions = "after_instruction",
    operator: Operator = add,
    strength: float | Float[Tensor, " batch"] = 1.0,
    template: Template | None = None,
) -> Iterator[Model]:
    """Steers every forward pass of the model inside the block: x[pos] <- operator(x[pos], v, strength).

    Works for `generate`, and for whatever you run yourself (`model(tokens)`, `run_with_cache`, `model.generate`, with or without a
    KV cache, padded or not): positions are found in the tokens that each pass is given. Contexts nest, and compose with
    `model.hooks(...)` in the order of entry. On any exit the hooks are gone; weights and configuration are never touched.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        vectors: a `SteeringVector`, a `VectorSet` (all its layers), or a list of them, applied in the order given.
        positions: which tokens are steered; see `caa_lens.positions`. The default is the paper's.
        operator: `add`, `ablate`, `clamp`, or `gate(...)`.
        strength: the operator's strength, one for all or one a row of the batches run inside; `1.5 * v` scales the
            vector itself.
        template: how prompts are written, to find the end of the instruction; the model's default otherwise.

    Yields:
        The model.

    Raises:
        InputError, MissingError: vectors or positions that do not fit the model, before anything runs.
        InputError: (in a forward pass) the end of the instruction is missing or ambiguous in the tokens.

    Example:
        >>> with caa.steer(model, 1.5 * v):  # doctest: +SKIP
        ...     print(caa.generate(model, "How was your weekend?"))
    """
    flat = flatten(model, vectors)
    tracker = PositionTracker(model, positions, template_for(model, template))
    added = [steering_hook(v, lambda _: tracker.current, operator=operator, strength=strength) for v in flat]
    with ExitStack() as stack:
        stack.enter_context(marked_as_steered(model))
        restore = stack.enter_context(hooks(model, added))

        def before_forward(inputs: Inputs) -> None:
            restore()
            tracker.see(inputs)

        stack.enter_context(watch_inputs(model, before_forward))
        yield model


def generate(
    model: Model,
    prompts: Conversation | Sequence[Conversation],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    draws: Sequence[int] | None = None,
    stream: bool | Callable[[str], None] = False,
    batch_size: int = 16,
    template: Template | None = None,
) -> str | list[str]:
    """Answers of the model, as it is or as the surrounding `steer` contexts and your own hooks make it.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        prompts: a string, a conversation (`[{"role": ..., "content": ...}, ...]`), or a list of either.
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 is greedy; above, tokens are sampled.
        top_k, top_p: restrict sampling to the k likeliest tokens, or to the smallest set of probability p.
        seed: of the sampling; prompt i of a list draws from its own stream, whatever the batch size.
        draws: a number for each prompt in place of i; prompts of equal number draw alike.
        stream: True prints the answer as it grows, a function is called with each piece; one prompt only.
        batch_size: prompts run together.
        template: how prompts are written; the model's default otherwise.

    Returns:
        The answer without the prompt and without the end-of-turn token; a list of answers for a list of prompts.

    Raises:
        InputError: no prompt, a prompt that leaves no room in the context, streaming of several prompts, or sampling
            options that make no sense.

    Note:
        Only the last position of the prompt is unembedded, so hooks behind the last block see one position a step.
    """
    conversations, single = _as_conversations(prompts)
    numbers = range(len(conversations)) if draws is None else draws
    if len(numbers) != len(conversations):
        raise InputError(f"draws has {len(numbers)} numbers for {len(conversations)} prompts; give one for each.")
    _check_sampling(max_new_tokens, temperature, top_k, top_p, stream, len(conversations), batch_size)
    tokenizer, chosen = tokenizer_of(model), template_for(model, template)
    encoded = [chosen.encode(tokenizer, conversation) for conversation in conversations]
    info = describe(model)
    for prompt in encoded:
        info.require_room("a prompt", len(prompt.ids), max_new_tokens=max_new_tokens)
    choose = _sampler(temperature, top_k, top_p)
    answers: list[str] = []
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        generators = [
            torch.Generator().manual_seed(_row_seed(seed, number)) for number in numbers[start : start + batch_size]
        ]
        with known_prompts([prompt.instruction_end for prompt in batch]):
            rows = generate_ids(
                model,
                [prompt.ids for prompt in batch],
                max_new_tokens=max_new_tokens,
                stop_ids=chosen.stop_ids(tokenizer),
                choose=lambda scores, generators=generators: choose(scores, generators),  # type: ignore[misc]
                emit=(_print if stream is True else stream) or None,
            )
        answers += [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    return answers[0] if single else answers


def _as_conversations(prompts: Any) -> tuple[list[Conversation], bool]:
    if isinstance(prompts, str):
        return [prompts], True
    items = list(prompts)
    if not items:
        raise InputError("no prompt to generate from; give a string, a conversation, or a list of them.")
    if all(isinstance(item, dict) for item in items):
        return [cast("Sequence[Message]", items)], True
    return items, False


def _check_sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stream: bool | Callable[[str], None],
    n_prompts: int,
    batch_size: int,
) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be at least 1.")
    if temperature < 0:
        raise InputError(f"temperature={temperature}: 0 is greedy, above 0 samples; it cannot be negative.")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise InputError("top_k and top_p restrict sampling; give a temperature above 0 with them.")
    if stream and n_prompts > 1:
        raise InputError(f"stream works for one prompt, got {n_prompts}; generate them one by one to stream.")


def _row_seed(seed: int, row: int) -> int:
    return (seed * 1_000_003 + row) % 2**63


def _print(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _sampler(
    temperature: float, top_k: int | None, top_p: float | None
) -> Callable[[Tensor, Sequence[torch.Generator]], Tensor]:
    """A function of (logits [batch, d_vocab], one generator a row) that chooses the next tokens."""
    if temperature == 0:
        return lambda scores, generators: scores.argmax(-1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))

    def sample(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        # Drawn on the CPU, so that a seed means the same on every device.
        probabilities = warpers(cast(Any, None), scores.float().cpu()).softmax(-1)
        drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
        return torch.cat(drawn).to(scores.device)

    return sample


@torch.no_grad()
def generate_ids(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    choose: Callable[[Float[Tensor, "batch d_vocab"]], Int[Tensor, " batch"]] = lambda scores: scores.argmax(-1),
    emit: Callable[[str], None] | None = None,
    run_last: bool = False,
) -> list[list[int]]:
    """The loop of `generate`: the prompts, padded on the left, in one pass, then one token a step from the KV cache.

    Args:
        prompts: token ids, one row a prompt.
        stop_ids: tokens that end an answer; they are not part of it.
        choose: from logits to the next tokens; greedy by default.
        emit: called with each new piece of the first row's text.
        run_last: run the last token too, for hooks that read every token of the answer.

    Returns:
        The new ids, one row a prompt.
    """
    tokenizer = tokenizer_of(model)
    tokens, mask = pad(prompts, side="left", device=device_of(model))
    rows: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    said, past = "", None
    for _ in range(max_new_tokens):
        logits, past = run(model, tokens, mask, past=past, grow=True, logits=1)
        assert logits is not None
        chosen = choose(logits[:, -1])
        for row, token in enumerate(chosen.tolist()):
            if row in unfinished:
                if token in stop_ids:
                    unfinished.discard(row)
                else:
                    rows[row].append(token)
        if emit:
            text = tokenizer.decode(rows[0], skip_special_tokens=True)
            # A token may end inside a character; wait for the rest of it.
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                emit(text[len(said) :])
                said = text
        if not unfinished:
            break
        tokens, mask = chosen.unsqueeze(1).to(tokens.device), torch.ones_like(mask[:, :1])
    if run_last and unfinished:
        run(model, tokens, mask, past=past, grow=True)
    return rows


def show_positions(
    model: Model,
    prompt: Conversation,
    *,
    completion: str | None = None,
    positions: Positions = "after_instruction",
    template: Template | None = None,
) -> None:
    """Prints a prompt's tokens, one a line, with the steered ones marked; the model is not run.

    Args:
        model: for its tokenizer and default template.
        prompt: a string or a conversation.
        completion: an answer to show behind it, as `generate` would have produced it.
        positions, template: as in `steer`.
    """
    tokenizer, chosen = tokenizer_of(model), template_for(model, template)
    encoded = chosen.encode(tokenizer, prompt, completion)
    tracker = PositionTracker(model, positions, chosen)
    tokens = torch.tensor([encoded.ids])
    with known_prompts([encoded.instruction_end]):
        tracker.see(Inputs(tokens, None, 0, (1, tokens.shape[1])))
    steered = tracker.current
    assert steered is not None
    lines = [
        f"{index:>4}  {'>' if on else ' '}  {tokenizer.decode([token])!r}"
        for index, (token, on) in enumerate(zip(encoded.ids, steered[0].tolist(), strict=True))
    ]
    count = int(steered.sum())
    print(f"{count} of {len(lines)} tokens steered (marked >), template {type(chosen).__name__}", *lines, sep="\n")
