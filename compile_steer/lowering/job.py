"""What every backend is given: the program, the model, and texts that the steered model writes when they are needed."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compile_steer.artifacts.writing import new_file
from compile_steer.common import distributed
from compile_steer.common.errors import CannotLower, RecipeError
from compile_steer.common.progress import Advance, Progress
from compile_steer.lowering.options import CompileOptions
from compile_steer.models.generate import continue_prompts
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode
from compile_steer.steering.layout import Layout
from compile_steer.steering.low_rank import linear_shape
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program

# The losses of a training, step by step, and its held-out measure before and after.
Curve = dict[str, list[float]]


@dataclass(frozen=True)
class ResumeFiles:
    """What a backend has done so far, on disk, so that a run that was killed continues and ends in the same bytes.

    Attributes:
        folder: where the named states lie; None saves nothing.
        inputs: hash of what they were made from; a state for other inputs is not loaded.
    """

    folder: Path | None = None
    inputs: str = ""

    def save(self, name: str, state: Any) -> None:
        """Replace the state under `name`: tensors, numbers and texts in lists, tuples and dicts."""
        if self.folder is not None:
            with new_file(self.folder / f"{name}.pt") as temporary:
                torch.save({"inputs": self.inputs, "state": state}, temporary)

    def load(self, name: str) -> Any:
        """The state under `name`, on the CPU; None where there is none for these inputs or the file is damaged."""
        if self.folder is None:
            return None
        try:
            # weights_only: a file in a run's folder may not run code.
            saved = torch.load(self.folder / f"{name}.pt", map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
            return None
        return saved["state"] if saved["inputs"] == self.inputs else None

    def clear(self) -> None:
        """Delete all states: the work is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # another run's states may lie beside them
                self.folder.parent.rmdir()


@dataclass(frozen=True)
class Lowering:
    """One program to lower. Under several processes each writes, and has, its share of the texts.

    Attributes:
        program: in canonical form.
        prompts: calibration prompts; the fitted backends learn from the steered model's continuations of them.
        resume: where a fitted backend saves its state.
        curves: what training recorded, by its name.
        patches: of the backends that ran before, by name; `full_cut` starts from that of `full`.
    """

    program: Program
    loaded: LoadedModel
    prompts: Sequence[Text]
    options: CompileOptions = field(default_factory=CompileOptions)
    seed: int = 0
    progress: Progress = field(default_factory=Progress)
    resume: ResumeFiles = ResumeFiles()
    curves: dict[str, Curve] = field(default_factory=dict)
    patches: dict[str, WeightPatch] = field(default_factory=dict)

    # Two sets: on texts that the regression has fitted already, the gradient of a training would see too small an error.
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
        if len(self.prompts) < stop:
            raise RecipeError(
                f"compile: calibration.prompts and distill.prompts need {stop} prompts, data.calibration has "
                f"{len(self.prompts)}. Lower one of them or add prompts."
            )
        # Sampling is slow, and a resumed run must have the same texts.
        saved = self.resume.load(label)
        if saved is not None:
            return [Encoded(**text) for text in saved]
        # By length, because a batch is padded to its longest prompt.
        by_length = sorted(self.prompts[start:stop], key=lambda t: len(t.prompt) + sum(map(len, sum(t.history, ()))))
        share = distributed.share([encode(self.loaded.tokenizer, text) for text in by_length])
        with self.progress.phase(f"steered model writes {label}", len(share)) as advance:
            # Another sample in every process: a large prime keeps their seeds apart, which count up by texts.
            seed = self.seed + start + 104729 * distributed.rank()
            texts = self.sample(share, self.program, seed, advance)
        self.resume.save(label, [asdict(text) for text in texts])
        return texts

    def sample(
        self, prompts: Sequence[Encoded], program: Program | None, seed: int, advance: Advance = lambda _n: None
    ) -> list[Encoded]:
        """Continue the prompts at temperature 1: the texts that the model, under `program` or the hooks of now, meets."""
        texts: list[Encoded] = []
        size, length = self.options.calibration.batch, self.options.calibration.max_new_tokens
        for at in range(0, len(prompts), size):
            batch = prompts[at : at + size]
            texts += continue_prompts(
                self.loaded, batch, program, max_new_tokens=length, temperature=1.0, seed=seed + at
            )
            advance(len(batch))
        return texts


def require_rank(layout: Layout, block: int, rank: int, key: str) -> None:
    """Raise `CannotLower` where a Linear of the block cannot have the rank of the recipe's `key`."""
    for name, module in layout.linears(block).items():
        d_out, d_in = linear_shape(module)
        if rank > min(d_out, d_in):
            raise CannotLower(f"{key} {rank} is above what {name} ({d_out} x {d_in}) can have.")
