"""Templates: how a prompt is written, where its instruction ends, and which token is the answer.

    text = template(system prompt, earlier turns, prompt) + joiner + completion
    instruction_end  = the token that covers the last character before the completion's joiner
    answer position  = the first token at which a pair's two tokenised texts differ

Everything is found by character offsets of the whole text, never by searching token ids: `\\nResponse:` encoded alone
is not the same ids as inside a prompt, and the published base-model runs steered every position because of it.
Tokenising is done with `add_special_tokens=False`; the template itself writes the BOS, exactly once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from caa_lens.errors import InputError
from caa_lens.files import digest
from caa_lens.pairs import ContrastPair

Message = Mapping[str, str]
Conversation = str | Sequence[Message]
"""A single user message, or messages `{"role": "system" | "user" | "assistant", "content": ...}` ending with the user's."""


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt, with its completion if it has one.

    Attributes:
        ids: token ids, BOS included where the template writes one.
        text: the text they encode, without a BOS that the tokenizer has no text for.
        instruction_end: index of the last token of the prompt proper; steering starts here by default.
        completion_start: index of the completion's first token; `len(ids)` when there is no completion.
    """

    ids: tuple[int, ...]
    text: str = field(repr=False)
    instruction_end: int
    completion_start: int

    @property
    def spans(self) -> dict[str, range]:
        """Named token ranges: `prefix` (before the instruction's last token), `instruction_end`, `completion`."""
        return {
            "prefix": range(self.instruction_end),
            "instruction_end": range(self.instruction_end, self.instruction_end + 1),
            "completion": range(self.completion_start, len(self.ids)),
        }


@dataclass(frozen=True)
class EncodedPair:
    """A contrast pair's two prompts; `answer` is the first index at which their ids differ."""

    positive: Prompt
    negative: Prompt
    answer: int


@dataclass(frozen=True)
class Template(ABC):
    """How a conversation becomes token ids.

    Attributes:
        system_prompt: system prompt for prompts that bring none of their own; None for none.
        turns: earlier (user, assistant) turns put before every prompt: few-shot examples.
    """

    system_prompt: str | None = None
    turns: tuple[tuple[str, str], ...] = ()

    joiner = ""
    """What stands between the prompt's last character and the completion."""

    @abstractmethod
    def render(self, tokenizer: Any, messages: list[Message]) -> str:
        """The text of a conversation up to and including the end of its last instruction, without BOS."""

    @abstractmethod
    def marker(self, tokenizer: Any) -> str:
        """The text that ends every instruction; empty where the template has none."""

    def bos(self, tokenizer: Any, text: str) -> list[int]:
        """The BOS to put before `text`: none if the tokenizer has none or the text begins with it."""
        if tokenizer.bos_token_id is None or text.startswith(tokenizer.bos_token):
            return []
        return [tokenizer.bos_token_id]

    def complete(self, completion: str) -> str:
        """The completion as it is written behind the prompt."""
        return self.joiner + completion

    def stop_ids(self, tokenizer: Any) -> frozenset[int]:
        """Token ids that end an answer."""
        return frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})

    @property
    def hash(self) -> str:
        """SHA-256 of the template's kind and settings."""
        return digest([type(self).__name__, asdict(self)])

    def messages(self, conversation: Conversation) -> list[Message]:
        """A conversation as messages, with the template's own system prompt and turns in their places.

        Raises:
            InputError: an unknown role, roles that do not alternate, or a conversation that does not end with the user.
        """
        given: list[Message]
        given = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else list(conversation)
        for message in given:
            if not isinstance(message, Mapping) or {"role", "content"} - set(message):
                raise InputError(f"a conversation is a list of {{'role', 'content'}} mappings; got {message!r}.")
        system = [message for message in given[:1] if message["role"] == "system"]
        if not system and self.system_prompt is not None:
            system = [{"role": "system", "content": self.system_prompt}]
        turns = [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        dialogue = [*turns, *(given[1:] if given[:1] and given[0]["role"] == "system" else given)]
        roles = [message["role"] for message in dialogue]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise InputError(
                f"a conversation alternates 'user' and 'assistant' and ends with 'user', after at most one 'system'; "
                f"got the roles {', '.join(roles) or 'none'}."
            )
        return [*system, *dialogue]

    def encode(self, tokenizer: Any, conversation: Conversation, completion: str | None = None) -> Prompt:
        """Token ids and spans of a conversation, with a completion or ready to be continued.

        Raises:
            InputError: a message contains the template's end-of-instruction marker, so that the instruction's end would
                be ambiguous; or the tokenizer gives no character offsets.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"{type(tokenizer).__name__} gives no character offsets, which positions are found by; load the fast "
                "tokenizer (AutoTokenizer.from_pretrained(..., use_fast=True))."
            )
        messages = self.messages(conversation)
        prompt = self.render(tokenizer, messages)
        self._check_marker(tokenizer, prompt, sum(message["role"] == "user" for message in messages))
        tail = "" if completion is None else self.complete(completion)
        encoding = tokenizer(prompt + tail, add_special_tokens=False, return_offsets_mapping=True)
        bos = self.bos(tokenizer, prompt)
        offsets = encoding["offset_mapping"]
        # The last token that begins in the prompt; of an empty prompt, the BOS.
        end = max((index for index, (start, _) in enumerate(offsets) if start < len(prompt)), default=-1) + len(bos)
        if end < 0:
            raise InputError(
                f"the prompt is empty, and {type(tokenizer).__name__} has no BOS token; give at least one token."
            )
        behind = len(prompt) + len(self.joiner)
        completion_start = next((index for index, (_, stop) in enumerate(offsets) if stop > behind), len(offsets))
        return Prompt(
            tuple(bos + encoding["input_ids"]),
            prompt + tail,
            end,
            (completion_start if completion is not None else len(offsets)) + len(bos),
        )

    def _check_marker(self, tokenizer: Any, prompt: str, expected: int) -> None:
        marker = self.marker(tokenizer)
        found = prompt.count(marker) if marker else expected
        if found != expected:
            raise InputError(
                f"the end-of-instruction marker {marker!r} of {type(self).__name__} occurs {found} times in the prompt "
                f"{prompt[-80:]!r}, expected {expected}; remove it from the messages, so that the end of the instruction "
                "is unambiguous."
            )

    def encode_pair(self, tokenizer: Any, pair: ContrastPair) -> EncodedPair:
        """Both sides of a pair, tokenised whole, and the first position at which they differ.

        Raises:
            InputError: both completions tokenise to the same ids, or one is the beginning of the other.
        """
        positive = self.encode(tokenizer, pair.prompt, pair.positive)
        negative = self.encode(tokenizer, pair.prompt, pair.negative)
        if positive.ids == negative.ids:
            raise InputError(
                f"{pair.where}: {pair.positive!r} and {pair.negative!r} tokenise to the same ids, so there is no answer "
                "token; write completions that differ in more than white space."
            )
        differ = (i for i, (a, b) in enumerate(zip(positive.ids, negative.ids, strict=False)) if a != b)
        answer = next(differ, None)
        if answer is None:
            raise InputError(
                f"{pair.where}: one of {pair.positive!r} and {pair.negative!r} is the beginning of the other, so there is no "
                "token at which they differ; end both with the same punctuation mark."
            )
        return EncodedPair(positive, negative, answer)

    def find_instruction_end(self, tokenizer: Any, ids: Sequence[int]) -> int:
        """Index of the last token of the end-of-instruction marker in ids that this template did not write itself.

        Raises:
            InputError: the marker is missing, or occurs more often than the template's own turns account for.
        """
        marker = self.marker(tokenizer)
        if not marker:
            raise InputError(
                f"{type(self).__name__} has no end-of-instruction marker, so positions relative to it are not defined in "
                "plain tokens; use positions='all', 'last', a slice or a mask, or caa_lens.generate()."
            )
        expected = len(self.turns) + 1

        def count(stop: int) -> int:
            text = tokenizer.decode(list(ids[:stop]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return text.count(marker)

        found = count(len(ids))
        if found != expected:
            raise InputError(
                f"the end-of-instruction marker {marker!r} of {type(self).__name__} occurs {found} times in the tokens, "
                f"expected {expected}; give tokens written in this template, another template=, or positions='all', a "
                "slice or a mask."
            )
        low, high = 1, len(ids)  # the shortest beginning that holds the whole marker
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if count(middle) >= expected else (middle + 1, high)
        return low - 1
