"""What every backend is given: the program, the model, and texts that the steered model writes when they are needed."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compile_steer.artifacts.writing import new_file
from compile_steer.common import distributed
from compile_steer.common.errors import CannotLower, RecipeError
from compile_steer.common.progress import Advance, Progress
from compile_steer.data.contexts import in_contexts
from compile_steer.lowering.options import CompileOptions
from compile_steer.models.generate import continue_prompts, response_text
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
class SavedState:
    """How far one part of a compile has come, on disk: tensors, numbers and texts in lists, tuples and dicts.

    Attributes:
        path: of its file; None saves nothing.
        made_from: hash of everything that decides the result.
        note: is told where a state was discarded.
    """

    path: Path | None
    made_from: str
    note: Callable[[str], None]

    def save(self, state: Any) -> None:
        """Replace the state; all processes have the same, and rank 0 writes it."""
        if self.path is not None and distributed.rank() == 0:
            with new_file(self.path) as temporary:
                torch.save({"made_from": self.made_from, "sha256": content_sha256(state), "state": state}, temporary)

    def load(self) -> Any:
        """The state, on the CPU; None where there is none, or where it was made from something else or is damaged."""
        return distributed.first(self._load)

    def _load(self) -> Any:
        if self.path is None or not self.path.is_file():
            return None
        with suppress(OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
            # weights_only: a file in a run's folder may not run code.
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            if saved["made_from"] == self.made_from and saved["sha256"] == content_sha256(saved["state"]):
                return saved["state"]
        self.discard("made from something else, or damaged")
        return None

    def discard(self, reason: str) -> None:
        """Say that the state is not used."""
        self.note(f"the saved state {self.path} is {reason}: this part begins again")


@dataclass(frozen=True)
class ResumeFiles:
    """What a backend has done so far, on disk, so that a run that was killed continues and ends in the same bytes.

    Attributes:
        folder: where the states lie; None saves nothing.
        inputs: hash of what the whole compile is made from.
    """

    folder: Path | None = None
    inputs: str = ""

    def clear(self) -> None:
        """Delete all states: the work is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # another run's states may lie beside them
                self.folder.parent.rmdir()


def content_sha256(*values: Any) -> str:
    """SHA-256 of tensors with their types and shapes, and of numbers and texts, in dicts, sequences and dataclasses."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            raw = value.detach().cpu().contiguous()
            digest.update(f"{raw.dtype} {list(raw.shape)};".encode())
            digest.update(raw.flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            add([part for item in value.items() for part in item])
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)}[".encode())
            for part in value:
                add(part)
        elif is_dataclass(value):
            add([getattr(value, part.name) for part in fields(value)])
        else:  # options among them, which show all that they hold
            digest.update(f"{value!r};".encode())

    add(values)
    return digest.hexdigest()


@dataclass(frozen=True)
class Lowering:
    """One program to lower.

    Attributes:
        program: in canonical form.
        prompts: calibration prompts; the fitted backends learn from the steered model's continuations of them.
        resume: where a fitted backend saves its state.
        curves: what training recorded, by its name.
        exact: by the name of a pass of the closed form, the blocks in which it leaves next to nothing of the program's change.
        patches: of the backends that ran before, by name; others may start from one, or be the same.
    """

    program: Program
    loaded: LoadedModel
    prompts: Sequence[Text]
    options: CompileOptions = field(default_factory=CompileOptions)
    seed: int = 0
    progress: Progress = field(default_factory=Progress)
    resume: ResumeFiles = ResumeFiles()
    curves: dict[str, Curve] = field(default_factory=dict)
    exact: dict[str, set[int]] = field(default_factory=dict)
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

    def state(self, name: str, *made_from: Any) -> SavedState:
        """The state saved under `name`, of a part that is made from these values, on top of the seed and the recipe."""
        if self.resume.folder is None:
            return SavedState(None, "", self.progress.note)
        made = content_sha256(self.resume.inputs, name, self.seed, *made_from)
        return SavedState(self.resume.folder / f"{name}.pt", made, self.progress.note)

    def _continuations(self, start: int, stop: int, label: str) -> list[Encoded]:
        if len(self.prompts) < stop:
            raise RecipeError(
                f"compile: calibration.prompts and distill.prompts need {stop} prompts, data.calibration has "
                f"{len(self.prompts)}. Lower one of them or add prompts."
            )
        # By length, because a batch is padded to its longest prompt.
        by_length = sorted(self.prompts[start:stop], key=lambda t: len(t.prompt) + sum(map(len, sum(t.history, ()))))
        encoded = [encode(self.loaded.tokenizer, text) for text in by_length]
        # Sampling is slow, and a resumed run must have the same texts.
        state = self.state(label, encoded, self.options.calibration, start)
        saved = state.load()
        if saved is not None:
            written = [Encoded(**text) for text in saved]
        else:
            with self.progress.phase(f"steered model writes {label}", len(encoded)) as advance:
                written = self.sample(encoded, self.program, self.seed + start, advance)
            state.save([asdict(text) for text in written])
        responses = [response_text(self.loaded, text) for text in written]
        texts = [replace(text, response=response) for text, response in zip(by_length, responses, strict=True)]
        longest, by_role = self.options.calibration.max_context, self.program.by_role
        # An answer that a document quotes looks like one that is given: texts alone, where roles are plain, should not be few.
        return in_contexts(self.loaded, texts, written, longest, self.seed + start, every_alone=by_role)

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
