"""Lower: a steering program -> a WeightPatch. Every backend is three functions:

refusal(program, layout) -> why the canonical program cannot be lowered so, or None (decided before any work);
adapter_refusal(program, layout) -> why the result cannot ship as a stock PEFT adapter, or None;
lower(job) -> WeightPatch.
"""

from compile_steer.lower import bias, closed_form, distill, orthogonalise, retarget
from compile_steer.lower.job import Job

# Exact first: a plan that may choose takes the first that does not refuse.
BACKENDS = {
    "bias": bias,
    "orthogonalise": orthogonalise,
    "retarget": retarget,
    "closed_form": closed_form,
    "distill": distill,
}
# What is fitted to texts of the steered model; the others are exact.
FITTED = frozenset({"closed_form", "distill"})

__all__ = ["BACKENDS", "FITTED", "Job"]
