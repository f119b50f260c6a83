"""The gates: what an artifact must reach. Each check passes, fails, or could not be made; what was not checked is said.

Imports no heavy library, so that `show` can tell whether a recorded verdict follows from the recorded figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from compile_steer.common.figures import decisive
from compile_steer.verification.options import Gates
from compile_steer.verification.parity import Check, Parity

# KL grows only with the square of the error of the strength, so a small divergence alone lets 10 % too much or too little
# pass. The gain shows it directly.
_GAIN_MARGIN = 0.05
# nats per token: summing in another order in fp32 changes a hundredth of this. A compile may be 2 % off; its file may not be.
_FILE_MARGIN = 1e-4
_LEAST_RESPONSES = 4  # of fewer answers no interval tells anything


def judged(parity: Parity, gates: Gates) -> Parity:
    """The report with every check of its figures, and the verdict that follows from them."""
    unmeasured = [*parity.unmeasured.items(), *(("prompts", remark) for remark in parity.remarks)]
    unchecked = [Check(name, "not checked", reason) for name, reason in unmeasured]
    checks = [*_limits(parity, gates), *_wordings(parity, gates), *_tests(parity), *unchecked]
    reasons = [check.text for check in checks if check.outcome == "failed"]
    return replace(parity, passed=not reasons, reasons=reasons, checks=checks)


def _check(name: str, passed: bool, reason: str) -> Check:
    return Check(name, "passed") if passed else Check(name, "failed", reason)


def _at_most(name: str, text: str, value: float, limit: float, form: str) -> Check:
    # `text` has {} in the place of the value. NaN compares false, so it misses every gate.
    shown, bound = decisive(value, limit, form)
    return _check(name, value <= limit, f"{text.replace('{}', shown)}; at most {bound}")


def _at_least(name: str, text: str, value: float, limit: float, form: str) -> Check:
    shown, bound = decisive(value, limit, form)
    return _check(name, value >= limit, f"{text.replace('{}', shown)}; at least {bound}")


def _kl(name: str, place: str, value: float, limit: float) -> Check:
    return _at_most(name, f"KL {{}} nats a token {place}", value, limit, ".2e")


def kl_limit(parity: Parity, gates: Gates, kl_base: float) -> float:
    """The largest mean KL(steered||compiled) that passes where KL(steered||base) is `kl_base`; all in nats per token."""
    # The artifact may cost as much as its precision costs the steered model; twice, because the two roundings are independent.
    noise = 2 * parity.rounding.kl_steered if parity.rounding else 0.0
    return (gates.exact_kl if parity.exact else gates.kl_remaining * kl_base) + noise


def _limits(parity: Parity, gates: Gates) -> Iterator[Check]:
    """The gates that compare a value with a limit."""
    d, b, rounding, adapter = parity.divergence, parity.behaviour, parity.rounding, parity.adapter
    flips = 2 * (1 - rounding.top1_steered) if rounding else 0.0
    most = kl_limit(parity, gates, d.kl_base)
    if (error := parity.file_error) is not None:
        written = (
            "it is not what was compiled: mean log p of a fixed text is {} nats a token from what the compiler's "
            "weights gave before they were written"
        )
        yield _at_most("on disk", written, error, _FILE_MARGIN, ".1e")
    yield _kl("KL", f"(remaining {d.kl_remaining.value:.2%})", d.kl.value, most)
    text = "control text: KL from the base {} nats a token"
    yield _at_most("control text", text, d.kl_control, d.kl_control_steered + gates.control_kl_margin, ".4f")
    if rounding and parity.form.startswith("gguf-"):
        # Quantising may cost more than a wrong compile does, so the compile is measured on the base quantised the same way.
        # What is left of the quantisation there is that edited matrices are rounded anew.
        most = (gates.exact_kl if parity.exact else gates.kl_remaining * rounding.kl_changed) + 2 * (
            rounding.kl_edited or 0.0
        )
        against = f"(remaining {rounding.kl_remaining:.2%}) from the hooks on the base quantised the same way"
        yield _kl("KL, quantised", against, rounding.kl, most)
    # Exact backends agree here to about 1e-11. For others there is no threshold that sound artifacts were measured against, and
    # a remaining KL of few tokens is not certain.
    places = {"at the prompts' positions": d.kl_prompt} | {f"on {s.name} prompts": s.kl for s in parity.prompt_sets}
    for place, kl in places.items() if parity.exact else ():
        unknown = Check(f"KL {place}", "not checked", "what rounding costs there is not measured")
        yield unknown if rounding and rounding.kl_steered else _kl(f"KL {place}", place, kl, gates.exact_kl)
    yield from _contexts(parity, gates)
    # Other scales are only reported: a change that was trained at one strength need not scale with it.
    for off in adapter.scales if adapter else ():
        if off.scale == 0:
            message = f"KL(base||adapter at scale 0) {off.kl:.2e} nats a token: something else has changed"
            yield _check("adapter at scale 0", off.kl <= gates.exact_kl, message)
    least = (gates.exact_top1 if parity.exact else gates.top1) - flips
    # Few tokens are wrong about a rate by more than an artifact may miss it by: the whole interval must lie below.
    bounds, highest = "", d.top1
    if (rate := d.top1_interval) is not None:
        bounds, highest = f" [{rate.low:.2%}, {rate.high:.2%}]", rate.high
    yield _check("top-1", highest >= least, f"top-1 agreement {d.top1:.2%}{bounds}; at least {least:.2%}")
    if effect := b.effect_retained:
        for name, value, gate in (
            ("effect retained", effect.value, gates.effect_retained),
            ("effect retained, lower bound", effect.low, gates.effect_retained_low),
        ):
            yield _at_least(name, f"{name} {{}}", value, gate, ".3f")


def _wordings(parity: Parity, gates: Gates) -> Iterator[Check]:
    """Held-out prompts put otherwise: a gate for exact backends, where the compile does not hold for others."""
    if parity.exact:
        for wording in () if parity.rounding else parity.wordings:
            yield _kl(f"KL, wording: {wording.name}", f"(wording: {wording.name})", wording.kl, gates.exact_kl)
        return
    above = [wording for wording in parity.wordings if (wording.kl_remaining or 0.0) > gates.kl_remaining]
    if above:
        each = ", ".join(f"{w.name} {decisive(w.kl_remaining or 0.0, gates.kl_remaining, '.2%')[0]}" for w in above)
        text = f"remaining KL above {gates.kl_remaining:.0%}, but on about {above[0].n_tokens} tokens each: {each}"
        yield Check("KL in other wordings", "not checked", text)


def _contexts(parity: Parity, gates: Gates) -> Iterator[Check]:
    """The worst length of context. Each has few answers: of an approximate compile the whole interval must be above."""
    if parity.exact and parity.contexts:
        worst = max(parity.contexts, key=lambda context: context.kl)
        unknown = Check("contexts", "not checked", "what rounding costs there is not measured")
        place = f"behind {worst.start:,} to {worst.stop:,} tokens"
        yield unknown if parity.rounding else _kl("contexts", place, worst.kl, gates.exact_kl)
        return
    enough = [context for context in parity.contexts if context.n_responses >= _LEAST_RESPONSES]
    if not enough:
        yield Check("contexts", "not checked", "no answers were read behind long contexts (verify.long)")
        return
    limits = [kl_limit(parity, gates, context.kl_base) / context.kl_base for context in enough]
    above, limit, worst = max(
        ((context.kl_remaining.low - limit, limit, context) for context, limit in zip(enough, limits, strict=True)),
        key=lambda excess: excess[0],
    )
    yield _check("contexts", above <= 0, f"remaining KL by tokens of context, {worst}; at most {limit:.2%}")


def _tests(parity: Parity) -> Iterator[Check]:
    """The gates that are no comparison with one limit."""
    b, adapter, gain = parity.behaviour, parity.adapter, parity.divergence.gain
    message = "the artifact's tokenizer splits held-out prompts differently from the base's"
    yield _check("tokenizer", parity.same_tokens, message)
    shown = decisive(gain, 1 + _GAIN_MARGIN if gain > 1 else 1 - _GAIN_MARGIN, ".3f")[0]
    message = f"the gain is {shown} of the steered model's change; needed 1 +- {_GAIN_MARGIN:g}"
    yield _check("gain", abs(gain - 1) <= _GAIN_MARGIN, message)
    message = "the steered model's log-likelihood margin does not differ from the base's: there is no effect to retain"
    yield _check("effect", b.effect_retained is not None, message)
    if b.margin:
        yield _check(b.margin.measure, b.margin.equivalent, str(b.margin))
    if b.score.enough or b.score.equivalent or b.score.different:
        yield _check("score", b.score.equivalent, str(b.score))
    else:  # scores of so few answers that no artifact could show equivalence are no reason
        yield Check("score", "not checked", str(b.score))
    more = f"{b.repetition_compiled:.2f} of its 3-grams, steered {b.repetition_steered:.2f}; {b.repetition}"
    # The whole interval must lie above the margin: answers that differ repeat more or less by chance.
    message = f"it repeats itself more than the steered model: {more}"
    yield _check("repetition", not b.repetition.low > b.repetition.margin, message)
    if lost := parity.capability:
        message = f"it can do less than the steered model: {lost}; {lost.test}"
        yield _check("capability", not lost.worse, message)
    else:
        yield Check("capability", "not checked", "no questions were asked (verify.capability: 0)")
    if adapter:
        random = max(adapter.random)
        message = (
            f"a random adapter of the same norms moves the test pairs as much ({random:.3f} against "
            f"{adapter.effect:.3f} nats a token): what it does is not the behaviour"
        )
        yield _check("random adapters", adapter.effect > random, message)
