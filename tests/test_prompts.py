"""Token ids as the paper's procedure writes them, spans, answer positions, markers."""

import copy

import pytest
from conftest import fixture_path

import caa_lens as caa
from caa_lens.templates import default_template


def paper_ids(tokenizer, question, answer, system=None):
    """The authors' text for Llama-2-chat, tokenised whole with the tokenizer's own BOS."""
    text = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return tokenizer.encode(f"{text}[INST] {question.strip()} [/INST] {answer.strip()}")


def test_paper_template_has_the_authors_token_ids(llama_tokenizer):
    for name in ("refusal", "survival-instinct", "sycophancy"):
        path = fixture_path(f"caa/datasets/generate/{name}/generate_dataset.json")
        for pair in caa.load_pairs(path)[:60]:
            for system in (None, "You are helpful."):
                both = caa.Llama2Chat(system_prompt=system).encode_pair(llama_tokenizer, pair)
                for side, answer in ((both.positive, pair.positive), (both.negative, pair.negative)):
                    assert list(side.ids) == paper_ids(llama_tokenizer, pair.prompt, answer, system)
                # The letter's token is index -2, and the instruction ends with the final "]".
                assert both.answer == len(both.positive.ids) - 2
                assert llama_tokenizer.convert_ids_to_tokens(both.positive.ids[both.positive.instruction_end]) == "]"
                assert both.positive.completion_start == both.positive.instruction_end + 1


def test_known_token_ids(llama_tokenizer):
    side = caa.Llama2Chat().encode(llama_tokenizer, "Hi", "(A)")
    assert side.ids[0] == 1
    assert side.ids[-7:] == (518, 29914, 25580, 29962, 313, 29909, 29897)


def test_base_template_finds_its_marker_in_context(llama_tokenizer):
    alone = llama_tokenizer.encode("\nResponse:", add_special_tokens=False)
    side = caa.Llama2Base().encode(llama_tokenizer, "What is it?", "(A)")
    assert tuple(alone) != side.ids[side.instruction_end - 2 : side.instruction_end + 1] == (13, 5103, 29901)
    assert list(side.ids) == llama_tokenizer.encode("Input: What is it?\nResponse: (A)")
    assert caa.Llama2Base().find_instruction_end(llama_tokenizer, side.ids) == side.instruction_end


def test_meta_system_prompt_stands_inside(llama_tokenizer):
    paper = caa.Llama2Chat(system_prompt="Be good.").encode(llama_tokenizer, "Hi").text
    meta = caa.Llama2Chat(system="meta", system_prompt="Be good.").encode(llama_tokenizer, "Hi").text
    assert paper == "<<SYS>>\nBe good.\n<</SYS>>\n\n[INST] Hi [/INST]"
    assert meta == "[INST] <<SYS>>\nBe good.\n<</SYS>>\n\nHi [/INST]"


def test_unknown_place_of_the_system_prompt(unchecked):
    with pytest.raises(caa.InputError, match="'paper' and 'meta'"):
        caa.Llama2Chat(system="other")


TEMPLATES = [caa.Llama2Chat(), caa.Llama2Chat(system="meta"), caa.Llama2Base(), caa.ChatTemplate(), caa.Plain()]


@pytest.mark.parametrize("template", TEMPLATES, ids=repr)
def test_system_turns_spans_and_one_bos(template, byte_tokenizer):
    few_shot = type(template)(**{**vars(template), "system_prompt": "Sys", "turns": (("q1", "a1"), ("q2", "a2"))})
    prompt = few_shot.encode(byte_tokenizer, "q3", "the answer")
    for text in ("Sys", "q1", "a1", "q2", "a2", "q3", "the answer"):
        assert prompt.text.count(text) == 1
    own = template.encode(byte_tokenizer, [
        {"role": "system", "content": "Sys"},
        {"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"},
        {"role": "user", "content": "q3"},
    ], "the answer")  # fmt: skip
    assert own == prompt
    first_bos = 0 if isinstance(template, caa.ChatTemplate) else 1
    assert prompt.ids[: first_bos + 1].count(byte_tokenizer.bos_token_id) == first_bos
    spans = prompt.spans
    assert byte_tokenizer.decode(prompt.ids[spans["completion"].start :]).strip() == "the answer"
    assert spans["prefix"].stop == spans["instruction_end"].start
    bare = few_shot.encode(byte_tokenizer, "q3")
    assert prompt.ids[: len(bare.ids)] == bare.ids
    assert bare.instruction_end == len(bare.ids) - 1 == prompt.instruction_end
    assert few_shot.hash != template.hash


def test_bos_in_the_text_is_not_doubled(byte_tokenizer):
    ids = caa.Plain().encode(byte_tokenizer, "<|bos|>hello").ids
    assert ids.count(byte_tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", TEMPLATES[:4], ids=repr)
def test_marker_found_in_plain_tokens_is_the_rendered_one(template, byte_tokenizer):
    prompt = template.encode(byte_tokenizer, "Why\nme?", "Because.")
    assert template.find_instruction_end(byte_tokenizer, prompt.ids) == prompt.instruction_end
    with pytest.raises(caa.InputError, match="occurs 0 times in the tokens, expected 1"):
        template.find_instruction_end(byte_tokenizer, prompt.ids[: prompt.instruction_end])
    with pytest.raises(caa.InputError, match="occurs 2 times in the tokens, expected 1"):
        template.find_instruction_end(byte_tokenizer, prompt.ids * 2)
    with pytest.raises(caa.InputError, match="occurs 2 times in the prompt"):
        template.encode(byte_tokenizer, f"x{template.marker(byte_tokenizer)}y")


def test_plain_has_no_marker(byte_tokenizer):
    with pytest.raises(caa.InputError, match="has no end-of-instruction marker"):
        caa.Plain().find_instruction_end(byte_tokenizer, [1, 2])


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [("yes", "yes it is", "is the beginning of the other"), ("(A)", " (A)", "tokenise to the same ids")],
)
def test_pairs_without_an_answer_token(byte_tokenizer, positive, negative, message):
    with pytest.raises(caa.InputError, match=message):
        caa.Llama2Chat().encode_pair(byte_tokenizer, caa.ContrastPair("q", positive, negative))


@pytest.mark.parametrize(
    "conversation",
    [
        [],
        [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "tool", "content": "a"}],
        [{"text": "a"}],
    ],
)
def test_malformed_conversations(byte_tokenizer, conversation):
    with pytest.raises(caa.InputError, match="a conversation"):
        caa.ChatTemplate().encode(byte_tokenizer, conversation)


def test_default_templates(byte_tokenizer, llama_tokenizer):
    assert default_template("meta-llama/Llama-2-7b-chat-hf", llama_tokenizer) == caa.Llama2Chat()
    assert default_template("Llama-2-13b-hf", llama_tokenizer) == caa.Llama2Base()
    assert default_template("other", byte_tokenizer) == caa.ChatTemplate()
    assert default_template("gpt2", llama_tokenizer) == caa.Plain()


def test_stop_ids_hold_the_end_of_turn(byte_tokenizer):
    assert byte_tokenizer.convert_tokens_to_ids("<|im_end|>") in caa.ChatTemplate().stop_ids(byte_tokenizer)


def test_an_empty_prompt_is_its_bos(byte_tokenizer, model):
    prompt = caa.Plain().encode(byte_tokenizer, "")
    assert (prompt.ids, prompt.instruction_end) == ((byte_tokenizer.bos_token_id,), 0)
    whole = caa.Plain().encode(byte_tokenizer, "", "Yes")
    assert (whole.instruction_end, whole.completion_start) == (0, 1)
    assert isinstance(caa.generate(model, "", template=caa.Plain(), max_new_tokens=2), str)
    without = copy.deepcopy(byte_tokenizer)
    without.bos_token = None
    with pytest.raises(caa.InputError, match="has no BOS token"):
        caa.Plain().encode(without, "")
