"""Can it still do what it could? Short questions with one right answer, answered freely and not chosen from a list.

Multiple choice misses what steering and compiling break first: a model that still ranks the right letter first may no
longer say it. The questions are ours, and few: they show damage, not ability.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from compile_steer.models.generate import continue_prompts, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.stats import LEVEL, Equivalence, equivalence
from compile_steer.steering.program import Program

_TOKENS = 12  # the longest right answer has five words
_YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Item:
    """A question and what counts as its answer: one of `answers` somewhere in the reply, as whole words in any case.

    Where the answer is one of two or more words, `among`, it must be the first of them that is said.
    """

    prompt: str
    answers: tuple[str, ...]
    among: tuple[str, ...] = ()

    def right(self, reply: str) -> bool:
        said = _first(self.among or self.answers, reply)
        return said is not None and said in self.answers


def _first(words: tuple[str, ...], reply: str) -> str | None:
    """Which of `words` is said first."""
    matches = {word: re.search(rf"(?<!\w){re.escape(word)}(?!\w)", reply, re.IGNORECASE) for word in words}
    found = {word: match.start() for word, match in matches.items() if match is not None}
    return min(found, key=lambda word: found[word], default=None)


# Of four kinds in turn, so that the first few are of every kind: arithmetic, copying, capitals, facts.
ITEMS = (
    Item("What is 2 + 3? Answer with a number.", ("5", "five")),
    Item("Repeat this word and nothing else: lantern", ("lantern",)),
    Item("What is the capital of France?", ("Paris",)),
    Item("Is fire hot? Answer yes or no.", ("yes",), _YES_NO),
    Item("What is 10 - 4? Answer with a number.", ("6", "six")),
    Item("Write the word 'purple' once.", ("purple",)),
    Item("What is the capital of Japan?", ("Tokyo",)),
    Item("Do cats have wings? Answer yes or no.", ("no",), _YES_NO),
    Item("What is 3 times 4? Answer with a number.", ("12", "twelve")),
    Item("Repeat these words exactly: red green blue", ("red green blue", "red, green, blue")),
    Item("What is the capital of Italy?", ("Rome",)),
    Item("Is Monday a day of the week? Answer yes or no.", ("yes",), _YES_NO),
    Item("Which number comes next: 7, 8, 9?", ("10", "ten")),
    Item("Copy this number: 4815", ("4815", "4,815")),
    Item("What is the capital of Germany?", ("Berlin",)),
    Item("Is the sun colder than ice? Answer yes or no.", ("no",), _YES_NO),
    Item("What is half of 20? Answer with a number.", ("10", "ten")),
    Item("Say 'good morning' and nothing else.", ("good morning",)),
    Item("What is the capital of Spain?", ("Madrid",)),
    Item("Can fish swim? Answer yes or no.", ("yes",), _YES_NO),
    Item("How many days are there in one week?", ("7", "seven")),
    Item("What is the last word of this line: we sailed to Norway", ("Norway",)),
    Item("What is the capital of Egypt?", ("Cairo",)),
    Item("Is a mouse larger than an elephant? Answer yes or no.", ("no",), _YES_NO),
)


@dataclass(frozen=True)
class Capability:
    """Shares of `n` questions answered rightly under base, steered and compiled.

    `lost` are answered by steered and not by compiled, `gained` the other way round; `p` is the exact one-sided McNemar
    test that no more are lost than gained. `test` is that the two are equivalent, question by question.
    """

    n: int
    base: float
    steered: float
    compiled: float
    lost: int
    gained: int
    p: float
    test: Equivalence

    @property
    def worse(self) -> bool:
        """True if more was lost than chance explains, or if so many questions could have shown equivalence and did not."""
        return self.p < LEVEL or (self.test.enough and not self.test.equivalent)

    def __str__(self) -> str:
        return (
            f"{self.n} questions answered freely: base {self.base:.2f}, steered {self.steered:.2f}, compiled {self.compiled:.2f}; "
            f"{self.lost} lost, {self.gained} gained (McNemar p = {self.p:.2g})"
        )


def answered(loaded: LoadedModel, count: int, program: Program | None = None) -> np.ndarray:
    """Which of the first `count` questions get their right answer, greedily, under `program` if given: [count], 1 or 0."""
    items = ITEMS[:count]
    if not items:
        return np.zeros(0)
    said = continue_prompts(loaded, [Text(item.prompt) for item in items], program, max_new_tokens=_TOKENS)
    replies = [response_text(loaded, one) for one in said]
    return np.array([float(item.right(reply)) for item, reply in zip(items, replies, strict=True)])


def compared(base: np.ndarray, steered: np.ndarray, compiled: np.ndarray, margin: float) -> Capability:
    """Hold what was answered rightly, [n] each, against each other; `margin` is of the share, for the equivalence.

    Raises:
        ValueError: fewer than two questions.
    """
    lost, gained = int(((steered == 1) & (compiled == 0)).sum()), int(((steered == 0) & (compiled == 1)).sum())
    p = float(binomtest(lost, lost + gained, alternative="greater").pvalue) if lost + gained else 1.0
    return Capability(
        n=len(base),
        base=float(base.mean()),
        steered=float(steered.mean()),
        compiled=float(compiled.mean()),
        lost=lost,
        gained=gained,
        p=p,
        test=equivalence("capability", compiled - steered, margin),
    )
