"""Which artifact a run recommends, and what it says of the others."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

import compile_steer
from compile_steer.common.errors import RecipeError
from compile_steer.common.terminal import Terminal
from compile_steer.report.recommendation import recommend
from compile_steer.report.terminal import print_recommendation
from compile_steer.verification.parity import Capability, Check, Parity
from tests.helpers.small_run import SmallRun


@pytest.fixture
def parity(run: SmallRun) -> Parity:
    measured = Parity.load(run.paths.adapter("closed_form") / "parity.json")
    settings = {"verify": {"forms": ["adapter", "merged-fp32", "merged-bf16"]}}
    return replace(measured, passed=True, reasons=[], checks=[], exact=False, settings=settings, capability=None)


def of(
    parity: Parity, backend: str, form: str, *, remaining: float = 0.01, why: str = "", exact: bool = False
) -> Parity:
    kl = replace(parity.divergence.kl_remaining, value=remaining)
    divergence = replace(parity.divergence, kl_remaining=kl)
    reasons = [why] if why else []
    return replace(
        parity, backend=backend, form=form, divergence=divergence, passed=not why, reasons=reasons, exact=exact
    )


def test_exact_comes_before_the_form_and_the_form_before_the_remaining_kl(parity: Parity) -> None:
    adapter, distill = (
        of(parity, "closed_form", "adapter", remaining=0.009),
        of(parity, "distill", "adapter", remaining=0.004),
    )
    merged = of(parity, "distill", "merged-fp32", remaining=0.001)
    shift, rounded = of(parity, "bias", "merged-fp32", exact=True), of(parity, "bias", "merged-bf16", exact=True)
    failed = of(parity, "full", "merged-fp32", why="KL 0.3 nats a token; at most 0.01")
    all_of_them = [adapter, merged, distill, rounded, failed, shift]
    chosen = recommend(all_of_them, [Path("a") / str(n) for n in range(6)])
    assert chosen.artifact == "bias merged-fp32" and str(chosen) == (
        f"Ship {Path('a/5')}: bias merged-fp32 passed and is exact"
    )
    assert chosen.others == [
        "not closed_form adapter: it passed, but is approximate, remaining KL 0.90%; ship it where the form has to be adapter",
        "not distill merged-fp32: it passed, but is approximate, remaining KL 0.10%",
        "not distill adapter: it passed, but is approximate, remaining KL 0.40%; ship it where the form has to be adapter",
        "not bias merged-bf16: it passed and is exact, but verify.forms names merged-fp32 first",
        "not full merged-fp32: it failed: KL 0.3 nats a token; at most 0.01",
    ]
    assert recommend([adapter, merged, distill]).artifact == "distill adapter"
    assert "ship it where the form" in chosen.others[2]


def test_checks_that_were_not_made_and_the_price_are_named(parity: Parity) -> None:
    unchecked = replace(
        of(parity, "distill", "adapter", remaining=0.001), checks=[Check("score", "not checked", "few")]
    )
    assert recommend([unchecked, of(parity, "closed_form", "adapter")]).artifact == "closed_form adapter"
    test = parity.behaviour.score
    priced = replace(unchecked, capability=Capability(24, 16 / 24, 11 / 24, 11 / 24, 0, 0, 1.0, test))
    chosen = recommend([priced], verdict="inconclusive")
    assert "not checked: score" in chosen.reason and "answered right: 46%, the base 67% (of 24)" in chosen.reason
    assert "inconclusive" in chosen.reason and str(chosen).startswith("Ship distill adapter: ")


def test_none_is_shipped_where_all_failed_or_the_validation_did(parity: Parity) -> None:
    failed = of(parity, "closed_form", "adapter", why="the gain is 1.2")
    nothing = recommend([failed])
    assert nothing.artifact == "" and nothing.folder is None
    assert str(nothing) == "Ship none: none of 1 verified artifacts passed"
    assert nothing.others == ["not closed_form adapter: it failed: the gain is 1.2"]
    assert str(recommend([parity], verdict="fail")) == "Ship none: the validation failed"
    assert recommend([]).artifact == ""
    with pytest.raises(RecipeError, match="found 1 reports and 2 folders"):
        compile_steer.recommend([parity], [Path("a"), Path("b")])


def test_the_terminal_prints_it_and_a_line_for_each_other_one(parity: Parity) -> None:
    stream = StringIO()
    failed = of(parity, "distill", "adapter", why="the gain is 1.2")
    print_recommendation(Terminal(file=stream, width=400), recommend([parity, failed], [Path("x"), Path("y")]))
    assert stream.getvalue().split("\n")[1:3] == [
        f"Ship x: closed_form adapter passed and is approximate, remaining KL {parity.divergence.kl_remaining.value:.2%}",
        "  not distill adapter: it failed: the gain is 1.2",
    ]
