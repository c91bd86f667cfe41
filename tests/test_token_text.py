"""The coloured text is the text: every token, whatever it holds, with its value, on a page, in a notebook and in a terminal."""

import sys
import time
import types
from html.parser import HTMLParser

import pytest
import torch

import caa_lens as caa
from caa_lens.scale import diverging_limit
from caa_lens.token_text import STEPS, TokenLine, shade, token_texts

NASTY = "<script>alert('x')</script> &amp; \"q\"\n\tnaïve 🧑‍🚀 שלום \x1b[31m \u202e end  "


class Spans(HTMLParser):
    """Texts and titles of the token spans; any other element that a token could have smuggled in is collected."""

    def __init__(self):
        super().__init__()
        self.texts, self.titles, self.classes, self.elements, self.inside = [], [], [], [], False

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.inside = self.inside or tag == "pre"
        if tag == "span" and self.inside:
            self.texts.append("")
            self.titles.append(dict(attrs)["title"])
            self.classes.append(dict(attrs).get("class", "").split())

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data

    @classmethod
    def of(cls, html):
        parser = cls()
        parser.feed(html)
        return parser


@pytest.mark.parametrize("text", [NASTY, "Hi 你好 🧑‍🚀🧑‍🚀.", "\N{REPLACEMENT CHARACTER} a \N{REPLACEMENT CHARACTER}"])
def test_joined_token_texts_are_the_text(byte_tokenizer, text):
    ids = byte_tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(byte_tokenizer, ids)
    assert "".join(texts) == text
    assert len(texts) == len(ids)


def test_token_texts_of_sentencepiece_keep_their_spaces(llama_tokenizer):
    text = "[INST] Why is 你 the   sky\nblue 🧑‍🚀? [/INST] Because."
    ids = llama_tokenizer.encode(text)
    texts = token_texts(llama_tokenizer, ids)
    assert "".join(texts) == llama_tokenizer.decode(ids, skip_special_tokens=False)
    assert "".join(texts[1:]).strip() == text
    assert " the" in texts


def test_a_cut_character_stays_visible(byte_tokenizer):
    ids = byte_tokenizer.encode("a🧑", add_special_tokens=False)[:-1]
    assert "".join(token_texts(byte_tokenizer, ids)) == "a\N{REPLACEMENT CHARACTER}"


def test_the_coloured_text_is_exactly_the_text(model, vectors, tmp_path):
    projection = caa.project(model, vectors[1], NASTY)
    prompt = caa.ChatTemplate().encode(model.tokenizer, NASTY).text
    assert "".join(projection.tokens) == prompt
    projection.save_html(tmp_path / "out" / "p.html")
    for html in (projection._repr_html_(), (tmp_path / "out" / "p.html").read_text(encoding="utf-8")):
        spans = Spans.of(html)
        shown = prompt.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e").replace("\u200d", r"\u200d")
        assert "".join(spans.texts) == shown
        assert len(spans.texts) == len(projection.tokens)
        assert "<script" not in html
        assert not set(spans.elements) & {"script", "a", "img"}
        assert [texts for texts, names in zip(spans.texts, spans.classes, strict=True) if "s" in names] == [
            "<|im_start|>",
            "<|im_end|>",
            "<|im_start|>",
        ]
    for index, (title, value) in enumerate(zip(spans.titles, projection.values.tolist(), strict=True)):
        place, _, shown = title.partition(": ")
        assert int(place) == index
        assert float(shown.replace(",", "")) == pytest.approx(value, rel=0.01)


def test_colours_are_symmetric_and_bounded():
    line = TokenLine("t", ["a", "b", "c", "d"], [-2.0, 0.0, 2.0, float("nan")], [False] * 4, limit=2.0)
    assert Spans.of(line.html).classes == [[f"n{STEPS}"], [], [f"p{STEPS}"], []]
    assert [shade(value, 4.0) for value in (-400, -4, -2, 0, 2, 4, 400)] == [-8, -8, -4, 0, 4, 8, 8]
    assert TokenLine("t", ["a"] * 3, [0.0] * 3, [False] * 3).scale == 1.0
    sink = TokenLine("t", ["a"] * 101, [1.0] * 100 + [1000.0], [False] * 101)
    assert sink.scale == diverging_limit(sink.values) == 1.5  # one sink leaves the rest seen, and is named
    assert "beyond the scale: 1 of 101, up to +1e+03" in sink.legend
    assert "beyond" not in line.legend


def test_several_layers_open_and_close(model, vectors):
    spans = Spans.of(caa.project(model, vectors, "Hi?")._repr_html_())
    assert spans.elements.count("details") == 3
    assert len(spans.texts) == 3 * len(caa.project(model, vectors, "Hi?").tokens)


def test_show_in_a_notebook_and_in_a_terminal(model, vectors, monkeypatch, capsys):
    projection = caa.project(model, vectors[1], NASTY)
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    projection.show()
    out = capsys.readouterr().out
    assert "<script>" in out
    assert "\x1b" not in out
    shown = []
    stub = types.ModuleType("IPython")
    stub.get_ipython = lambda: types.SimpleNamespace(kernel=True)
    stub.display = types.ModuleType("IPython.display")
    stub.display.display = lambda data, raw: shown.append(data["text/html"])
    monkeypatch.setitem(sys.modules, "IPython", stub)
    monkeypatch.setitem(sys.modules, "IPython.display", stub.display)
    projection.show(limit=3.0)
    assert "+3<" in shown[0]
    assert Spans.of(shown[0]).texts == Spans.of(projection._repr_html_()).texts


def long_projection(n_layers, n_tokens=4000):
    """Of words, line breaks and a script, as a tokenizer would cut them."""
    tokens = tuple((" the", " <script>", "ing", ".\n", " 你", "")[i % 6] for i in range(n_tokens))
    values = torch.randn(n_layers, n_tokens, generator=torch.Generator().manual_seed(0))
    values[:, 0] = 300.0
    return caa.Projection(
        values=values.squeeze(0),
        tokens=tokens,
        token_ids=tuple(range(n_tokens)),
        special=(False,) * n_tokens,
        layers=tuple(range(n_layers)),
        measure="dot",
        vector="v",
        steering=None,
        instruction_end=None,
        provenance={},
    )


def test_a_long_text_is_small_html_and_quick(capsys, tmp_path):
    """4,000 tokens: under 250 kB a layer, so that a notebook stays small and quick; nothing grows with their square."""
    one = long_projection(1)
    began = time.process_time()
    html = one._repr_html_()
    one.save_html(tmp_path / "one.html")
    one.show()  # in a terminal
    assert time.process_time() - began < 3  # 0.1 s, and half a second where every call is checked
    assert len(html) < 250_000
    assert Spans.of(html).texts == list(one.tokens)
    assert capsys.readouterr().out.count("<script>") == one.tokens.count(" <script>")
    several = long_projection(10)._repr_html_()
    assert len(several) < 2_500_000
    assert several.count("<details open>") == 1  # the others are not laid out


def test_save_html_is_whole_or_absent(model, vectors, tmp_path):
    projection = caa.project(model, vectors[1], "Hi?")
    path = tmp_path / "p.html"
    path.write_text("before")
    with pytest.raises(caa.InputError, match="above zero"):
        projection.save_html(path, limit=0)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
