"""The recall benchmark's questions, and what counts as an answer."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.recall import FACTS, KINDS, questions, recall


class Words:
    """A tokenizer that knows words and line breaks."""

    def __init__(self):
        self.words: list[str] = []

    def __call__(self, text, add_special_tokens=False):
        words = text.replace("\n", " <n> ").replace(".", " .").split()
        self.words += [word for word in dict.fromkeys(words) if word not in self.words]
        return {"input_ids": [self.words.index(word) for word in words]}


@pytest.fixture
def asked():
    generator, tokenizer = random.Random(0), Words()
    text = "\n".join(" ".join(generator.choice("abcdefgh") for _ in range(40)) for _ in range(20))
    return tokenizer, text, questions(tokenizer, text, 300, 6)


def test_facts_lie_so_far_back(asked):
    tokenizer, text, found = asked
    for question in found:
        words = [tokenizer.words[i] for i in question.ids]
        stem = next(kind.split("{}")[1].split() for kind in KINDS if words[-1] == kind.split()[-1])
        ends = [i for i, word in enumerate(words) if word == "."]
        assert len(ends) == FACTS
        asks = len(words) - 1 - words[::-1].index("<n>")
        assert asks - ends[-1] - 1 == 300
        assert words[-len(stem) :] == stem
        stated = " ".join(words[: ends[-1]])
        right = tokenizer.words[question.choices[0]]
        assert f"{' '.join(words[asks + 1 :])} {right}" in stated
        assert len(set(question.choices)) == FACTS
        assert all(tokenizer.words[i] in stated.split() for i in question.choices)
    again = questions(tokenizer, text, 300, 6)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(found, again, strict=True))
    with pytest.raises(ValueError, match="shorter than 5000 tokens"):
        questions(tokenizer, text, 5000, 1)


@pytest.mark.parametrize(("place", "right", "chosen"), [(0, 1.0, 1.0), (1, 0.0, 0.0), (None, 0.0, 1.0)])
def test_what_is_right(asked, place, right, chosen):
    tokenizer, _, found = asked
    scores = iter(found)

    class Oracle(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, ids, **_):
            question, logits = next(scores), torch.zeros(1, 1, len(tokenizer.words) + 1)
            assert torch.equal(ids[0], question.ids)
            logits[0, 0, question.choices[0]] = 1.0
            logits[0, 0, -1 if place is None else question.choices[place]] = 2.0
            return SimpleNamespace(logits=logits)

    assert recall(Oracle(), found) == {"right": right, "chosen": chosen}
