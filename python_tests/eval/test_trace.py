"""The page of a run: its text is the answers', its colours are the cycles', and it parses."""

from html.parser import HTMLParser

from dflash_ext.decode import Completion, decode
from dflash_ext.eval.trace import trace_page
from python_tests.tiny import random_prompts, tiny_pair

VOID = {"meta"}


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects the text of answers and the titles of cycles."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.answers, self.titles, self.own = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        kinds = given.get("class", "").split()
        if tag not in VOID:
            self.open.append((tag, kinds))
        if "answer" in kinds:
            self.answers.append("")
        if "cycle" in kinds:
            self.titles.append(given["title"])
        if "own" in kinds:
            self.own.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any("answer" in kinds for _, kinds in self.open):
            self.answers[-1] += data
        if self.open and "own" in self.open[-1][1]:
            self.own[-1] += data


def text(tokens: list[int]) -> str:
    return "".join(f"<{token}&" for token in tokens)


def test_answers_cycles_and_rejected_drafts():
    target, drafter = tiny_pair("llama")
    prompts = random_prompts(4, 9)
    decoded = decode(target, drafter, prompts, max_new_tokens=12)
    names = [f"prompt {i}" for i in (1, 2)]
    page = trace_page(
        [(n, text(p), c) for n, p, c in zip(names, prompts, decoded.completions, strict=True)], text, title="<t>"
    )
    parsed = Page(page)
    assert parsed.answers == [text(completion.tokens) for completion in decoded.completions]
    assert len(parsed.titles) == sum(1 + len(completion.committed) for completion in decoded.completions)
    first = decoded.completions[0]
    told = f"cycle 1: {first.accepted[0]} of {len(first.drafted[0])} drafted tokens accepted"
    assert parsed.titles[1].startswith(told)
    assert text(first.drafted[0][first.accepted[0] :]) in parsed.titles[1]
    assert "<t>" not in page and "http" not in page


def test_a_stop_token_in_an_accepted_draft_and_half_characters():
    halves = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"b"}

    def detokenize(tokens: list[int]) -> str:
        return b"".join(halves[token] for token in tokens).decode(errors="replace")

    completion = Completion(
        [1, 2, 3, 4], "stop", committed=[1, 2], verified=[2, 3], accepted=[0, 3], drafted=[[4, 4], [3, 4, 1]]
    )
    parsed = Page(trace_page([("one", "", completion)], detokenize, title="t"))
    assert parsed.answers == ["aéb"] and parsed.own == ["", ""]


def test_a_rejected_draft_goes_on_with_the_character_before_it():
    halves = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"b"}

    def detokenize(tokens: list[int]) -> str:
        return b"".join(halves[token] for token in tokens).decode(errors="replace")

    answer = Completion([1, 2, 4], finish_reason="length", committed=[2], accepted=[1], drafted=[[2, 3, 1]])
    _, told = Page(trace_page([("p", "", answer)], detokenize, title="t")).titles
    assert told == "cycle 1: 1 of 3 drafted tokens accepted, rejected: éa"
    plain = Completion([1, 4], finish_reason="length", committed=[1], accepted=[0], drafted=[[]])
    assert Page(trace_page([("p", "", plain)], detokenize, title="t")).titles[1] == "cycle 1: no draft"
