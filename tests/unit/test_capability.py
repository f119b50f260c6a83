"""Short questions answered freely: what counts as right, and when fewer right answers are damage."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binom

from compile_steer.models.generate import continue_prompts, response_text
from compile_steer.models.text import Text
from compile_steer.report.terminal import print_parities
from compile_steer.verify.capability import _TOKENS, ITEMS, Item, answered, compared
from compile_steer.verify.options import Verify
from compile_steer.verify.parity import judge
from tests.helpers.verification import VerifierCase

NUMBER = Item("What is 3 times 4?", ("12", "twelve"))
CHOICE = Item("Is fire hot?", ("no",), ("yes", "no"))


@pytest.mark.parametrize(
    ("item", "reply", "right"),
    [
        (NUMBER, "3 times 4 is 12.", True),
        (NUMBER, "Twelve!", True),
        (NUMBER, "It is 120, or 112, or 1 2.", False),
        (NUMBER, "", False),
        (CHOICE, "No, though some say yes.", True),
        (CHOICE, "Yes, there is no doubt.", False),
        (CHOICE, "Nobody knows.", False),
        (ITEMS[13], "4,815", True),
        (ITEMS[9], "Red, green, blue", True),
        (ITEMS[9], "red blue green", False),
    ],
)
def test_a_reply_is_right_if_the_answer_is_said_as_whole_words(item: Item, reply: str, right: bool) -> None:
    assert item.right(reply) is right


def test_the_questions_are_24_of_four_kinds_in_turn_and_do_not_answer_themselves() -> None:
    assert len({item.prompt for item in ITEMS}) == len(ITEMS) == 24
    assert all(item.among == ("yes", "no") for item in ITEMS[3::4]) and not any(item.among for item in ITEMS[0::4])
    assert all("capital" in item.prompt for item in ITEMS[2::4])
    assert sorted(item.answers[0] for item in ITEMS[3::4]) == ["no"] * 3 + ["yes"] * 3, "always yes is half right"
    for item in (*ITEMS[0::4], *ITEMS[2::4]):
        assert not item.right(item.prompt), "to repeat the question is no answer"


def test_lost_and_gained_are_counted_and_tested_in_pairs() -> None:
    steered = np.array([1.0] * 9 + [0.0] * 3)
    compiled = steered.copy()
    compiled[:6], compiled[10] = 0.0, 1.0
    found = compared(np.ones(12), steered, compiled, 0.05)
    assert (found.n, found.lost, found.gained, found.base) == (12, 6, 1, 1.0)
    assert found.steered == pytest.approx(0.75) and found.compiled == pytest.approx(4 / 12)
    assert found.p == pytest.approx(float(binom.sf(5, 7, 0.5))) and found.p > 0.05 and not found.worse
    compiled[6] = 0.0
    compiled[10] = 0.0
    assert compared(np.ones(12), steered, compiled, 0.05).worse, "seven lost and none gained"
    same = compared(np.ones(12), steered, steered, 0.05)
    assert (same.lost, same.gained, same.p, same.worse) == (0, 0, 1.0, False)
    assert same.test.difference == 0 and not same.test.enough, "twelve answers alike do not show that 95 of 100 are"
    # A bare handful shows nothing, and is not held against it.
    one = compared(np.ones(4), np.ones(4), np.array([1.0, 1.0, 1.0, 0.0]), 0.05)
    assert not one.test.equivalent and not one.test.enough and not one.worse


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> VerifierCase:
    return VerifierCase.of(tmp_path_factory.mktemp("scene"), capability=3)


def test_it_is_asked_greedily_and_as_a_user_asks(scene: VerifierCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model knows none of it: what it says is made the answer of two questions, steered and not."""
    for at, program in ((0, None), (2, scene.program)):
        said = continue_prompts(scene.base, [Text(ITEMS[at].prompt)], program, max_new_tokens=_TOKENS)
        word = response_text(scene.base, said[0]).split()[-1]
        items = tuple(replace(one, answers=(word,), among=()) if n == at else one for n, one in enumerate(ITEMS))
        monkeypatch.setattr("compile_steer.verify.capability.ITEMS", items)
        found = answered(scene.base, 3, program)
        assert found.shape == (3,) and found[at] == 1.0 and set(found) <= {0.0, 1.0}


def test_the_judge_asks_all_three_and_fails_what_can_do_less(scene: VerifierCase) -> None:
    parity, gates = scene.parity_of(scene.merged()), scene.reference.recipe.verify.gates
    assert parity.passed and parity.capability is not None and parity.capability.n == 3
    assert parity.capability.steered == float(scene.reference.steered_able.mean())
    assert (parity.capability.lost, parity.capability.gained) == (0, 0)
    broken = compared(np.ones(9), np.ones(9), np.array([0.0] * 6 + [1.0] * 3), 0.05)
    (reason,) = judge(replace(parity, capability=broken), gates)
    assert reason.startswith("it can do less than the steered model: 9 questions answered freely: base 1.00")
    stream = StringIO()
    print_parities(Console(file=stream, width=300), [replace(parity, capability=broken)])
    assert "6 lost, 0 gained (McNemar p = 0.016)" in stream.getvalue()


def test_none_are_asked_where_none_are_wanted_and_one_is_refused() -> None:
    assert Verify(capability=0).capability == 0 and Verify().capability == len(ITEMS)
    for count in (1, 25, -1):
        with pytest.raises(ValueError, match="capability"):
            Verify(capability=count)
