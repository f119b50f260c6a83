"""Lower: a steering program -> a WeightPatch."""

from collections.abc import Callable
from dataclasses import dataclass

from compile_steer.lower import bias, closed_form, convert_architecture, distill, full, orthogonalise
from compile_steer.lower.job import Job, Refusal, first_refusal
from compile_steer.steering.patch import WeightPatch


@dataclass(frozen=True)
class Backend:
    """One way to lower.

    `refusal` says why the canonical program cannot be lowered so, or None (decided before any work);
    `adapter_refusal` why the result cannot ship as a stock PEFT adapter, or None. A `fitted` backend is given texts of
    the steered model; the others are exact. One that `shares` can run in several processes, each with its share of the texts.
    """

    refusal: Refusal
    adapter_refusal: Refusal
    lower: Callable[[Job], WeightPatch]
    fitted: bool
    shares: bool = True


def _fitted_lora(lower: Callable[[Job], WeightPatch], *, shares: bool) -> Backend:
    """Low-rank edits of Linears, which can be fitted to any program, and are what a LoRA is."""
    return Backend(first_refusal, lambda *_: None, lower, fitted=True, shares=shares)


# Exact first: a plan that may choose takes the first that does not refuse.
BACKENDS = {
    "bias": Backend(bias.refusal, bias.adapter_refusal, bias.lower, fitted=False),
    "orthogonalise": Backend(orthogonalise.refusal, orthogonalise.adapter_refusal, orthogonalise.lower, fitted=False),
    "retarget": Backend(
        convert_architecture.refusal, convert_architecture.adapter_refusal, convert_architecture.lower, fitted=False
    ),
    "closed_form": _fitted_lora(closed_form.lower, shares=True),
    "distill": _fitted_lora(distill.lower, shares=False),
    "full": Backend(first_refusal, full.adapter_refusal, full.lower, fitted=True, shares=False),
    "full_cut": _fitted_lora(full.lower_cut, shares=False),
}
