"""What is found about a composition, as it is saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from compile_steer.artifacts.files import save_json
from compile_steer.stats import Interval

# A steered model that is closer to its base than this, in nats a token, is the base: no share of it can be taken.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Row:
    """What each thing that is switched on does to one behaviour: change of its contrast against base, nats a token.

    `effects` has a column for the hooks of each program and of all, each adapter, all of them loaded at once, and each that
    was composed (stacked, joint). `cross`: all at once less the sum of each alone, for hooks and adapters. `missed`: what
    is shipped, that is the adapters loaded at once and the composed ones, less the hooks.
    """

    behaviour: str
    n_pairs: int
    effects: dict[str, Interval]
    cross: dict[str, Interval]
    missed: dict[str, Interval]


@dataclass(frozen=True)
class Fit:
    """Hooks and adapters at `dials`: mean KL(hooks || adapters) and KL(hooks || base), nats a token, and top-1 agreement."""

    dials: tuple[float, ...]
    kl: float
    kl_base: float
    top1: float

    @property
    def share(self) -> float | None:
        """None where the hooks cancel: there is then nothing to have a share of."""
        return self.kl / self.kl_base if self.kl_base > _NOTHING else None


@dataclass(frozen=True)
class Interplay:
    """Norms of final hidden states, relative to the root of the summed squares of what the programs do one by one.

    `programs`: what the hooks do at once less the sum of what each does alone. `alone`: the errors of the adapters, each
    alone against its own hooks, summed. `errors`: the error of what is shipped, by how. `cross`: the error of the adapters
    loaded at once less `alone`, which is what the compile adds by their being on together.
    """

    programs: float
    alone: float
    errors: dict[str, float]
    cross: float


@dataclass(frozen=True)
class Composition:
    """The interference matrix, what is shipped against all hooks at once, and every dial by itself.

    `artifacts` are the adapters loaded at once, and what was composed of them, if anything was.
    """

    names: list[str]
    dials: list[float]
    backend: str
    matrix: list[Row]
    artifacts: dict[str, Fit]
    settings: list[Fit]
    stacked_from_loaded: float | None  # mean KL(the adapters loaded at once || stacked), nats a token
    interplay: Interplay
    n_tokens: int
    sha256: dict[str, str]
    reasons: list[str]

    @property
    def passed(self) -> bool:
        return not self.reasons

    def save(self, path: Path) -> None:
        save_json(path, self.summary())

    def summary(self) -> dict[str, object]:
        """All of it as JSON."""
        return asdict(self) | {"passed": self.passed}
