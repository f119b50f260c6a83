"""Which of a run's artifacts to ship, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compile_steer.common.errors import RecipeError
from compile_steer.common.summary import Summary
from compile_steer.validation.report import Verdict
from compile_steer.verification.parity import Parity


@dataclass(frozen=True, repr=False)
class Recommendation(Summary):
    """The artifact to ship, and a line for each of the others.

    Attributes:
        artifact: its backend and form; empty if none is to be shipped.
        folder: where it lies, if that is known.
        reason: why this one, or why none.
        others: what is against each of the others, in the order in which they were verified.
    """

    artifact: str
    folder: Path | None
    reason: str
    others: list[str]

    def __str__(self) -> str:
        shipped = "Ship none" if not self.artifact else f"Ship {self.folder or self.artifact}"
        return f"{shipped}: {self.reason}"

    def summary_rows(self) -> list[tuple[str, str]]:
        return [("recommended", str(self)), *(("", line) for line in self.others)]


def recommend(
    parities: Sequence[Parity], folders: Sequence[Path] = (), *, verdict: Verdict | None = None
) -> Recommendation:
    """Choose among the artifacts of one program that passed, if there is any.

    An exact one comes before an approximate one; then the form that `verify.forms` names first, then the fewest checks
    that were not made, then the least remaining KL.

    Args:
        parities: a report on each, as `verify` returns them.
        folders: where each artifact lies, if there is more to say than its backend and form.
        verdict: of the program's validation; none is shipped if it failed.

    Raises:
        RecipeError: there are folders, but not as many as reports.
    """
    if folders and len(folders) != len(parities):
        raise RecipeError(f"found {len(parities)} reports and {len(folders)} folders; needed: a report on each folder.")
    order = sorted((n for n, p in enumerate(parities) if p.passed), key=lambda n: _rank(parities[n]))
    if not order or verdict == "fail":
        none = "the validation failed" if verdict == "fail" else f"none of {len(parities)} verified artifacts passed"
        return Recommendation("", None, none, [_against(p, parities[0]) for p in parities if not p.passed])
    best = parities[order[0]]
    others = [_against(parity, best) for n, parity in enumerate(parities) if n != order[0]]
    return Recommendation(_name(best), folders[order[0]] if folders else None, _reason(best, verdict), others)


def _rank(p: Parity) -> tuple[bool, int, int, float]:
    return not p.exact, _place(p), len(p.unchecked), p.divergence.kl_remaining.value


def _place(p: Parity) -> int:
    """The place of the form among those that were asked for."""
    forms = list(p.settings.get("verify", {}).get("forms", []))
    return forms.index(p.form) if p.form in forms else len(forms)


def _name(p: Parity) -> str:
    return f"{p.backend} {p.form}"


def _kind(p: Parity) -> str:
    return "exact" if p.exact else f"approximate, remaining KL {p.divergence.kl_remaining.value:.2%}"


def _reason(p: Parity, verdict: Verdict | None) -> str:
    parts = [f"{_name(p)} passed and is {_kind(p)}"]
    if p.unchecked:
        parts.append(f"not checked: {', '.join(dict.fromkeys(check.name for check in p.unchecked))}")
    if (c := p.capability) is not None:
        parts.append(f"plain questions answered right: {c.compiled:.0%}, the base {c.base:.0%} (of {c.n})")
    if verdict == "inconclusive":
        parts.append("the validation is inconclusive, so test it on your own prompts first")
    return "; ".join(parts)


def _against(p: Parity, best: Parity) -> str:
    if not p.passed:
        return f"not {_name(p)}: it failed: {'; '.join(p.reasons)}"
    if p.exact != best.exact:
        needed = f"; ship it where the form has to be {p.form}" if _place(p) < _place(best) else ""
        return f"not {_name(p)}: it passed, but is {_kind(p)}{needed}"
    if p.form != best.form:
        return f"not {_name(p)}: it passed and is {_kind(p)}, but verify.forms names {best.form} first"
    unchecked = f", with {len(p.unchecked)} checks not made" if p.unchecked else ""
    return f"not {_name(p)}: it passed too, and is {_kind(p)}{unchecked}"
