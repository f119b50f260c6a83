"""Lower: a steering program -> a WeightPatch. Every backend is two functions:

refusal(program, layout) -> why the canonical program cannot be lowered so, or None (decided before any work);
lower(job) -> WeightPatch.
"""

from compile_steer.lower import bias, closed_form, distill
from compile_steer.lower.job import Job

# Exact first: a plan that may choose takes the first that does not refuse.
BACKENDS = {"bias": bias, "closed_form": closed_form, "distill": distill}
EXACT = frozenset({"bias"})

__all__ = ["BACKENDS", "EXACT", "Job"]
