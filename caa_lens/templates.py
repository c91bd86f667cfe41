"""The ways to write a prompt: the paper's for Llama-2 (chat and base), the tokenizer's own chat template, and plain text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from caa_lens.errors import InputError
from caa_lens.prompts import Message, Template
from caa_lens.provenance import bare_name


@dataclass(frozen=True)
class Llama2Chat(Template):
    """Llama-2-chat: `[INST] {prompt} [/INST] {completion}`.

    Attributes:
        system: where the system prompt goes: `"paper"` puts it before `[INST]`, as the CAA authors' code does; `"meta"`
            inside the first `[INST]`, as Meta's own chat format does. The numbers differ.
    """

    system: Literal["paper", "meta"] = "paper"
    joiner = " "

    def __post_init__(self) -> None:
        if self.system not in ("paper", "meta"):
            raise InputError(f"Llama2Chat(system={self.system!r}): allowed are 'paper' and 'meta'.")

    def render(self, tokenizer: Any, messages: list[Message]) -> str:
        text = block = ""
        for message in messages:
            content = message["content"].strip()
            if message["role"] == "system":
                block = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
            elif message["role"] == "assistant":
                text += f" {content} {tokenizer.eos_token}{tokenizer.bos_token}"
            elif self.system == "paper":
                text, block = f"{text}{block}[INST] {content} [/INST]", ""
            else:
                text, block = f"{text}[INST] {block}{content} [/INST]", ""
        return text

    def marker(self, tokenizer: Any) -> str:
        return "[/INST]"

    def complete(self, completion: str) -> str:
        return self.joiner + completion.strip()


@dataclass(frozen=True)
class Llama2Base(Template):
    """The paper's form for base models: `Input: {prompt}\\nResponse: {completion}`; turns are blocks of that form."""

    joiner = " "

    def render(self, tokenizer: Any, messages: list[Message]) -> str:
        parts = []
        for message in messages:
            content = message["content"].strip()
            if message["role"] == "system":
                parts.append(f"{content}\n\n")
            elif message["role"] == "assistant":
                parts.append(f" {content}\n\n")
            else:
                parts.append(f"Input: {content}\nResponse:")
        return "".join(parts)

    def marker(self, tokenizer: Any) -> str:
        return "\nResponse:"

    def complete(self, completion: str) -> str:
        return self.joiner + completion.strip()


@dataclass(frozen=True)
class ChatTemplate(Template):
    """The tokenizer's own chat template as it stands, with its generation prompt.

    Some templates insert a system prompt of their own when none is given (SmolLM2, Qwen); that is kept.
    """

    def render(self, tokenizer: Any, messages: list[Message]) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "this tokenizer has no chat template; use Plain(), Llama2Chat() or Llama2Base(), or set "
                "tokenizer.chat_template."
            )
        try:
            return tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like
            raise InputError(
                f"the tokenizer's chat template refuses this conversation ({error}); leave out the system prompt if it "
                "knows none."
            ) from error

    def marker(self, tokenizer: Any) -> str:
        sentinel = "caa-lens-user-text"
        return self.render(tokenizer, [{"role": "user", "content": sentinel}]).rpartition(sentinel)[2]

    def bos(self, tokenizer: Any, text: str) -> list[int]:
        return []  # whether there is one is the template's decision

    def stop_ids(self, tokenizer: Any) -> frozenset[int]:
        sentinel = "caa-lens-answer"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": sentinel}], tokenize=False
        )
        after = tokenizer(text.rpartition(sentinel)[2], add_special_tokens=False)["input_ids"]
        return super().stop_ids(tokenizer) | (set(after[:1]) & set(tokenizer.all_special_ids))


@dataclass(frozen=True)
class Plain(Template):
    """Text as it is, with a BOS where the tokenizer has one (TransformerLens' habit); system prompt and turns are
    paragraphs before it, a turn's answer directly behind its prompt, as a completion is.

    It has no marker: `after_instruction` is the prompt's last token where this package wrote the prompt, and refused
    for plain tokens.
    """

    def render(self, tokenizer: Any, messages: list[Message]) -> str:
        ends = {"assistant": "\n\n", "system": "\n\n", "user": ""}
        return "".join(message["content"] + ends[message["role"]] for message in messages)

    def marker(self, tokenizer: Any) -> str:
        return ""


def default_template(model_name: str, tokenizer: Any) -> Template:
    """The template of a model that names none: Llama-2's own forms, else the chat template, else `Plain`."""
    name = bare_name(model_name)
    if name.startswith("llama-2"):
        return Llama2Chat() if "chat" in name else Llama2Base()
    return ChatTemplate() if getattr(tokenizer, "chat_template", None) else Plain()
