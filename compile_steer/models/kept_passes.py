"""What a model writes and computes on given texts, kept between runs.

Base and steered model are the same in every verification of a program, whatever is compiled of it. They are kept in the cache
of the user who measured them, never in a run's folder: that may be a stranger's, whose numbers would be believed. Artifacts are
not kept, but loaded and run each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from compile_steer.artifacts.files import digest, sha256
from compile_steer.artifacts.provenance import versions
from compile_steer.artifacts.revision import identity_of
from compile_steer.artifacts.tensors import read_tensors, save_tensors
from compile_steer.common import distributed
from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.models.forward import lm_head
from compile_steer.models.load import LoadedModel
from compile_steer.models.packing import pack
from compile_steer.models.shared_blocks import final_hidden
from compile_steer.models.source import cache_folder
from compile_steer.models.tokens import Encoded
from compile_steer.steering.blocks import token_ids
from compile_steer.steering.compare import distance, tolerance_of
from compile_steer.steering.program import Program

_WHOLE = torch.contiguous_format
_PROBE, _PROBED = "probe", 16  # its key, and tokens
LARGEST = 2 * 2**30  # bytes of the cache; beyond, what was used longest ago is removed

Programs = Program | Sequence[Program] | None
Made = tuple[Tensor, ...]


class KeptPasses:
    """What passes of one model gave, by what they were given; in one file of the cache.

    Attributes:
        path: the file; None where the cache has no place, or nobody knows which model this is.
        found: whether an earlier run has left some.
    """

    def __init__(self, loaded: LoadedModel, program: Program, rounding: str = "") -> None:
        """Read what is kept of a model and a program; `rounding` says how the weights were rounded since they were loaded.

        Nothing is taken where the cache has no place, the file is damaged, or base and steered model do not compute what they
        did: their weights may have been edited since they were loaded.
        """
        self._model = loaded.model
        self.path = _place(loaded, program, rounding)
        self._known = distributed.first(lambda: _read(self.path))
        probe = _probe(loaded, program)
        (before,) = self._known.get(_PROBE, (probe.new_zeros(()),))
        if before.shape != probe.shape or not distance(probe, before) <= tolerance_of(loaded.model.dtype):
            self._known = {}
        self._used: dict[str, Made] = {_PROBE: (probe,)}
        self.found = bool(self._known)

    def serve(self, loaded: LoadedModel) -> bool:
        """Whether `loaded` is the model whose passes these are, and not an artifact made from it."""
        return loaded.model is self._model

    def get(self, key: str, make: Callable[[], Made]) -> Made:
        """What `make` returned for the same key, or returns now."""
        if key not in self._used:
            self._used[key] = self._known[key] if key in self._known else make()
        return self._used[key]

    def save(self) -> str:
        """Keep what was used for the next run; returns why that cannot be done, '' where it was."""
        return distributed.first(self._save)

    def _save(self) -> str:
        if self.path is None:
            return ""
        new = self._used.keys() - self._known.keys()
        tensors = {f"{key}.{n}": tensor for key, made in self._used.items() for n, tensor in enumerate(made)}
        if sum(tensor.nbytes for tensor in tensors.values()) > LARGEST:
            return f"they take more than {LARGEST / 2**30:.0f} GiB"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if new:
                # clone: several results may be views of one tensor, and safetensors refuses shared memory.
                own = {name: tensor.cpu().clone(memory_format=_WHOLE) for name, tensor in tensors.items()}
                save_tensors(self.path, own, {})
                self._known |= self._used
            else:
                self.path.touch()
            _remove_oldest(self.path.parent)
        except (OSError, ArtifactError) as error:
            return str(error)
        return ""


def kept_or_made(
    loaded: LoadedModel, texts: Sequence[Encoded], program: Programs, make: Callable[[], Made], **settings: object
) -> Made:
    """What `make` computes of these texts, from an earlier run where `loaded` keeps its passes.

    Args:
        settings: all else that the result depends on, and what it is of.
    """
    kept = loaded.kept
    if kept is None or not kept.serve(loaded):
        return make()
    programs = program if isinstance(program, Sequence) else [program]
    steering = [program and _content(program) for program in programs]
    read = [[text.ids, text.n_prompt, text.earlier] for text in texts]
    return kept.get(digest([settings, steering, read]), make)


def kept_or_compared(compared: Sequence[tuple[LoadedModel, Tensor]], make: Callable[[], Made]) -> Made:
    """What `make` computes of final states, each by the head of its model, from an earlier run where all keep their passes."""
    first, parts = compared[0][0].kept, ["compared"]
    for loaded, states in compared:
        if loaded.kept is None or not loaded.kept.serve(loaded):
            return make()
        raw = states.cpu().contiguous().view(torch.uint8).numpy().data
        parts += [str(loaded.kept.path), hashlib.sha256(raw).hexdigest()]
    assert first is not None
    return first.get(distributed.first(lambda: digest(parts)), make)  # `make` may need all processes, or none of them


def _probe(loaded: LoadedModel, program: Program) -> Tensor:
    """What base and steered model compute of a few tokens: final states, then the last one's logits, [2, n]."""
    ids = tuple(token_ids(loaded.model)[0, :_PROBED].tolist())
    (batch,) = pack(loaded, [Encoded(ids, len(ids) // 2)])
    states = torch.cat([final_hidden(loaded, batch, steering) for steering in (None, program)])
    with torch.no_grad():
        logits = lm_head(loaded.model, states[:, -1])
    return torch.cat([states.flatten(start_dim=1).cpu(), logits.cpu()], dim=1)


def _content(program: Program) -> str:
    """The hash of what the program does, whatever else its file says."""
    return program.scaled(1.0).sha256


def _place(loaded: LoadedModel, program: Program, rounding: str) -> Path | None:
    """The file for a model, a program, and everything that computes."""
    if not (identity := identity_of(loaded.revision)):
        return None  # a model that was never on a disk: another may have its name
    try:
        folder = cache_folder()
    except RecipeError:
        return None
    device = loaded.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    # Sums in another order differ in the last digits.
    computes = [str(loaded.model.dtype), device.type, machine, torch.get_num_threads(), distributed.count()]
    name = digest([identity, rounding, _content(program), computes, versions(), _code()])
    return folder / "passes" / f"{name}.safetensors"


@cache
def _code() -> str:
    """SHA-256 of this package's code: what another version computed may be something else."""
    package = Path(__file__).parent.parent
    return digest([[str(file.relative_to(package)), sha256(file)] for file in sorted(package.rglob("*.py"))])


def _read(path: Path | None) -> dict[str, Made]:
    made: dict[str, dict[int, Tensor]] = {}
    try:
        for name, tensor in (read_tensors(path)[0] if path else {}).items():
            key, _dot, number = name.rpartition(".")
            made.setdefault(key, {})[int(number)] = tensor
    except (ArtifactError, OSError, ValueError):
        return {}
    return {key: tuple(parts[n] for n in sorted(parts)) for key, parts in made.items()}


def _remove_oldest(folder: Path) -> None:
    left = LARGEST
    for file in sorted(folder.glob("*.safetensors"), key=lambda file: -file.stat().st_mtime):
        left -= file.stat().st_size
        if left < 0:
            file.unlink(missing_ok=True)
