"""Recall: facts stated early in a text and asked for hundreds of tokens later, which perplexity hardly sees.

    python -m benchmarks.recall MODEL ... --text TEXT

Each text states four facts of one kind ("The lighthouse of Marrow Bay is painted green."), goes on with paragraphs of
TEXT, and ends in the beginning of a sentence that repeats one of them ("The lighthouse of Marrow Bay is painted").
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

DISTANCES = (512, 1024, 2048, 3000)  # tokens from the facts to the question
FACTS = 4
PLACES = (
    "Marrow Bay", "Eastwick", "Dunmore", "Kestrel Point", "Oldham Cross", "Fairlight", "Tarn Hollow", "Saint Brannoc",
    "Wexcombe", "Northgate", "Ashby Vale", "Linden Quay", "Harrow Hill", "Brackley", "Silver Creek", "Greyport",
)  # fmt: skip
KINDS = {
    "The lighthouse of {} is painted": ("green", "red", "black", "white", "yellow", "blue", "grey", "brown"),
    "The old doctor of {} keeps a pet": ("fox", "cat", "horse", "dog", "snake", "bear", "rabbit", "goat"),
    "The mayor of {} plays the": ("piano", "guitar", "drum", "violin", "flute", "harp", "trumpet", "organ"),
    "The bell in {} was made of": ("copper", "gold", "silver", "iron", "glass", "stone", "wood", "steel"),
}


@dataclass(frozen=True)
class Question:
    """A text that ends where a fact is asked for.

    Attributes:
        ids: its tokens, `[length]`.
        choices: first tokens of the answers to all facts that were stated, the right one first.
    """

    ids: Tensor
    choices: list[int]


def questions(
    tokenizer: PreTrainedTokenizerBase, text: str, distance: int, count: int, seed: int = 0
) -> list[Question]:
    """Texts of one length, with `distance` tokens between the facts and the question.

    Args:
        tokenizer: of the models that will be asked.
        text: what lies in between: paragraphs, in an order of the seed's.
        distance: in tokens.
        count: how many.
        seed: of facts and text.

    Raises:
        ValueError: the text is too short.
    """
    generator = random.Random(f"{seed} {distance}")
    paragraphs = [line.strip() for line in text.splitlines() if len(line.split()) > 30]
    found = []
    for _ in range(count):
        stem, values = generator.choice(list(KINDS.items()))
        facts = list(zip(generator.sample(PLACES, FACTS), generator.sample(values, FACTS), strict=True))
        stated = " ".join(f"{stem.format(place)} {value}." for place, value in facts)
        place, value = generator.choice(facts)
        generator.shuffle(paragraphs)
        between, room = [], distance
        for paragraph in paragraphs:
            ids = _ids(tokenizer, "\n" + paragraph)[:room]
            between, room = between + ids, room - len(ids)
            if not room:
                break
        else:
            raise ValueError(f"the text is shorter than {distance} tokens")
        ids = _ids(tokenizer, stated) + between + _ids(tokenizer, f"\n{stem.format(place)}")
        others = [other for _, other in facts if other != value]
        choices = [_ids(tokenizer, f" {word}")[0] for word in (value, *others)]
        found.append(Question(torch.tensor(ids), choices))
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def recall(model: nn.Module, asked: list[Question]) -> dict[str, float]:
    """Shares of questions that a model answers: `right`, of all it could say, and `chosen`, of the stated answers."""
    right = chosen = 0
    for question in asked:
        ids = question.ids[None].to(next(model.parameters()).device)
        logits = model(ids, logits_to_keep=1, use_cache=False).logits[0, -1]
        right += int(logits.argmax()) == question.choices[0]
        chosen += int(logits[question.choices].argmax()) == 0
    return {"right": right / len(asked), "chosen": chosen / len(asked)}


def main() -> None:
    """Ask models, and show what they recall."""
    from t2r.evaluation import load_model, load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--distance", type=int, action="append")
    options = parser.parse_args()
    distances = options.distance or DISTANCES
    table = Table("model", *(f"{distance:,}" for distance in distances), title=f"right / chosen of {FACTS}")
    for name in options.models:
        model, tokenizer, cells = load_model(name, dtype="float32"), load_tokenizer(name), []
        for distance in distances:
            asked = questions(tokenizer, options.text.read_text(encoding="utf-8"), distance, options.count)
            cells.append("{right:.2f} / {chosen:.2f}".format(**recall(model, asked)))
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
