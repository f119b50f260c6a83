"""What every backend is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

from compile_steer.common import distributed
from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Advance, Progress
from compile_steer.data.behaviour import Behaviour
from compile_steer.lower.options import Compile
from compile_steer.lower.work import NOWHERE, Curve, Work
from compile_steer.models.generate import continue_encoded
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode
from compile_steer.steering.layout import Layout
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Intervention, Program

Refusal = Callable[[Program, Layout], str | None]


def first_refusal(
    program: Program, layout: Layout, why: Callable[[Intervention, Layout], str | None] = lambda *_: None
) -> str | None:
    """The first intervention's reason `why` not, with its name; an empty program is refused; else None."""
    if not program.interventions:
        return "the program has no active intervention; there is nothing to compile"
    for one in program.interventions:
        reason = why(one, layout)
        if reason is not None:
            return f"{one.operation} at {one.site}: {reason}"
    return None


def _length(text: Text) -> int:
    return sum(map(len, (text.prompt, *(said for turn in text.history for said in turn))))


@dataclass(frozen=True)
class Job:
    """One program to lower. The texts are the steered model's own, written when first asked for.

    Closed form and distillation get different texts: on the same ones the gradient would see an error
    that the regression has already fitted. Under several processes each writes, and has, its share of them.
    `finished` are the patches of backends that ran before, by name; `work` is where a backend keeps its state, `curves`
    what it recorded.
    """

    program: Program
    loaded: LoadedModel
    behaviour: Behaviour
    options: Compile
    seed: int
    progress: Progress
    work: Work = NOWHERE
    curves: dict[str, Curve] = field(default_factory=dict)
    finished: dict[str, WeightPatch] = field(default_factory=dict)

    @cached_property
    def regression_texts(self) -> list[Encoded]:
        """Steered continuations of the first `calibration.prompts` prompts, for the closed form."""
        return self._continuations(0, self.options.calibration.prompts, "calibration texts")

    @cached_property
    def training_texts(self) -> list[Encoded]:
        """Steered continuations of the `distill.prompts` prompts after those."""
        first = self.options.calibration.prompts
        return self._continuations(first, first + self.options.distill.prompts, "training texts")

    def _continuations(self, start: int, stop: int, label: str) -> list[Encoded]:
        """Sampled at temperature 1: the texts that the steered model itself would meet."""
        available = self.behaviour.calibration
        if len(available) < stop:
            raise RecipeError(
                f"compile: calibration.prompts and distill.prompts want {stop} prompts, data.calibration has "
                f"{len(available)}. Lower one of them or add prompts."
            )
        kept = self.work.kept(label)
        if kept is not None:
            return [Encoded.from_json(one) for one in kept[1]]
        # By length, because a batch is padded to its longest prompt.
        prompts = [encode(self.loaded.tokenizer, text) for text in sorted(available[start:stop], key=_length)]
        mine = distributed.share(prompts)
        with self.progress.phase(f"steered model writes {label}", len(mine)) as advance:
            found = self.write(mine, self.program, self.seed + start + 104729 * distributed.rank(), advance)
        self.work.keep(label, {}, [asdict(one) for one in found])
        return found

    def write(
        self, prompts: Sequence[Encoded], program: Program | None, seed: int, advance: Advance = lambda _n: None
    ) -> list[Encoded]:
        """Continue the prompts at temperature 1, under `program` or with whatever is on."""
        found: list[Encoded] = []
        size = self.options.calibration.batch
        for at in range(0, len(prompts), size):
            found += continue_encoded(
                self.loaded,
                prompts[at : at + size],
                program,
                max_new_tokens=self.options.calibration.max_new_tokens,
                temperature=1.0,
                seed=seed + at,
            )
            advance(len(found[at:]))
        return found
