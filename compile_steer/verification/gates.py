"""The gates: every reason why an artifact is not the steered model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compile_steer.verification.options import Gates
    from compile_steer.verification.parity import Parity

# KL grows only with the square of the error of the strength, so a small divergence alone lets 10 % too much or too little
# pass. The gain shows it directly.
_GAIN_MARGIN = 0.05
# nats per token: summing in another order in fp32 changes a hundredth of this. A compile may be 2 % off; its file may not be.
_FILE_MARGIN = 1e-4


def check(parity: Parity, gates: Gates) -> list[str]:
    """Every gate that the artifact misses, in words; empty where it passes."""
    checks = (check_file, check_divergence, check_behaviour, check_prompt_sets, check_adapter)
    return [reason for one in checks for reason in one(parity, gates)]


def check_file(parity: Parity, _gates: Gates) -> Iterator[str]:
    """The file is what was compiled, and its tokenizer is the base's."""
    if parity.file_error is not None and not parity.file_error <= _FILE_MARGIN:
        yield (
            f"it is not what was compiled: mean log p of a fixed text is {parity.file_error:.1e} nats a token from what the "
            f"compiler's weights gave before they were written; at most {_FILE_MARGIN:.0e}"
        )
    if not parity.same_tokens:
        yield "the artifact's tokenizer splits held-out prompts differently from the base's"


def check_divergence(parity: Parity, gates: Gates) -> Iterator[str]:
    """The next-token distributions on held-out and control text are the steered model's."""
    d, rounding, noise_kl = parity.divergence, parity.rounding, parity.noise_kl
    # The artifact may cost as much as its precision costs the steered model; twice, because the two roundings are independent.
    most = (gates.exact_kl if parity.exact else gates.kl_remaining * d.kl_base) + 2 * noise_kl
    least = (gates.exact_top1 if parity.exact else gates.top1) - 2 * (1 - (rounding.top1_steered if rounding else 1.0))
    if not d.kl.value <= most:
        yield f"KL {d.kl.value:.2e} nats a token (remaining {d.kl_remaining.value:.2%}); at most {most:.2e}"
    if rounding is not None and parity.form.startswith("gguf-"):
        # Quantising may cost more than a wrong compile does, so the compile is judged on the base quantised the same way.
        # What is left of the quantisation there is that edited matrices are rounded anew.
        most = gates.exact_kl if parity.exact else gates.kl_remaining * rounding.kl_changed
        most += 2 * rounding.kl_edited
        if not rounding.kl <= most:
            yield (
                f"KL {rounding.kl:.2e} nats a token (remaining {rounding.kl_remaining:.2%}) from the hooks on the base "
                f"quantised the same way; at most {most:.2e}"
            )
    # What rounding costs at prompt positions is not measured, so only full precision can be held to it. A program that an
    # approximate backend compiled has no gate there: its fit is weighted to the responses.
    if parity.exact and noise_kl == 0 and not d.kl_prompt <= gates.exact_kl:
        yield f"KL {d.kl_prompt:.2e} nats a token at the prompts' positions; at most {gates.exact_kl:.2e}"
    if not d.top1 >= least:
        yield f"top-1 agreement {d.top1:.2%}; at least {least:.2%}"
    if not abs(d.gain - 1) <= _GAIN_MARGIN:
        yield f"the gain is {d.gain:.3f} of the steered model's change; needed 1 +- {_GAIN_MARGIN:g}"
    most = d.kl_control_steered + gates.control_kl_margin
    if not d.kl_control <= most:
        yield f"control text: KL from the base {d.kl_control:.4f} nats a token; at most {most:.4f}"


def check_behaviour(parity: Parity, gates: Gates) -> Iterator[str]:
    """The behaviour is the steered model's, and no ability was lost."""
    b = parity.behaviour
    if b.effect_retained is None:
        yield "the steered model's log-likelihood margin does not differ from the base's: there is no effect to retain"
    else:
        if not b.effect_retained.value >= gates.effect_retained:
            yield f"effect retained {b.effect_retained.value:.3f}; at least {gates.effect_retained:g}"
        if not b.effect_retained.low >= gates.effect_retained_low:
            yield f"effect retained, lower bound {b.effect_retained.low:.3f}; at least {gates.effect_retained_low:g}"
    # Scores of so few prompts that no artifact could show equivalence are no reason.
    scores = [test for test in (b.score, b.prompt_sets) if test is not None and test.enough]
    yield from (str(test) for test in (b.margin, *scores) if test is not None and not test.equivalent)
    # The whole interval must lie above the margin: answers that differ repeat more or less by chance.
    if b.repetition.low > b.repetition.margin:
        yield (
            f"it repeats itself more than the steered model: {b.repetition_compiled:.2f} of its 3-grams, steered "
            f"{b.repetition_steered:.2f}; {b.repetition}"
        )
    if parity.capability is not None and parity.capability.worse:
        yield f"it can do less than the steered model: {parity.capability}; {parity.capability.test}"


def check_prompt_sets(parity: Parity, gates: Gates) -> Iterator[str]:
    """An exact artifact in full precision is exact on every prompt set."""
    # What rounding costs is not measured there, and a remaining KL of few tokens is not certain: those are only reported.
    if parity.exact and parity.noise_kl == 0:
        for one in parity.prompt_sets:
            if not one.kl <= gates.exact_kl:
                yield f"KL {one.kl:.2e} nats a token on {one.name} prompts; at most {gates.exact_kl:.2e}"


def check_adapter(parity: Parity, gates: Gates) -> Iterator[str]:
    """The adapter at scale 0 is the base, and a random adapter does less."""
    if parity.adapter is None:
        return
    # Other scales are only reported: a change that was trained at one strength need not scale with it.
    for one in parity.adapter.scales:
        if one.kl_remaining is None and not one.kl <= gates.exact_kl:
            yield f"KL(base||adapter at scale 0) {one.kl:.2e} nats a token: something else has changed"
    if not parity.adapter.effect > max(parity.adapter.random):
        yield (
            f"a random adapter of the same norms moves the test pairs as much ({max(parity.adapter.random):.3f} against "
            f"{parity.adapter.effect:.3f} nats a token): what it does is not the behaviour"
        )
