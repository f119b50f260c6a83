"""Write what one engine loads, in the one form that it loads right; or say why it would not.

Engines read few of an adapter's settings and few of a checkpoint's biases, and some drop the rest without a word. So
nothing is passed on as it is found: adapters become plain LoRA, and what cannot be said in an engine's words is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from compile_steer.artifacts.files import new_folder, own_files, save_record, sha256
from compile_steer.artifacts.provenance import PROVENANCE, REPORTS, EngineName, Provenance, artifact_sha256, versions
from compile_steer.artifacts.tensors import Checkpoint
from compile_steer.common.errors import ArtifactError, CannotLower, CompileSteerError
from compile_steer.export.adapter import PATCH_FILE, write_lora
from compile_steer.export.engine_support import PLUGIN, adapter_refusals, checkpoint_refusals
from compile_steer.export.gguf import GGUF_KINDS, write_gguf_file, write_lora_gguf
from compile_steer.formats.lora import ADAPTER_CONFIG, PlainLora, read_lora
from compile_steer.models.load import folder_of, load, quiet
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.tools.vector_files import shifts, write_gguf, write_vllm_lens

RECORD = "export.json"
_BESIDE = (*REPORTS, PROVENANCE)  # about the artifact's own folder; the record names it by its hash


@dataclass(frozen=True)
class Shipped:
    """What was written: the `kind` of the artifact, files below `folder`, what was changed on the way, and how to load it."""

    engine: EngineName
    kind: str
    folder: Path
    files: list[str]
    notes: list[str]
    load: list[str]

    def summary(self) -> dict[str, object]:
        """All of it, as JSON."""
        return {**self.__dict__, "folder": str(self.folder)}


def ship(artifact: Path, engine: EngineName, out: Path, base: str | None = None, precision: str = "f16") -> Shipped:
    """Write to the folder `out` what `engine` loads of an adapter, a checkpoint or a program; whole or not at all.

    Args:
        base: the adapter's base model, where the adapter does not name it.
        precision: of a checkpoint for llama.cpp, one of `GGUF_KINDS`.

    Raises:
        ArtifactError: the artifact is damaged, was changed after it was written, or is none of the three.
        CannotLower: the engine would load it wrongly or not at all; every reason is named.
    """
    if precision not in GGUF_KINDS:
        raise ArtifactError(f"--precision {precision}: needed: {', '.join(GGUF_KINDS)}.")
    kind, write = _writer(artifact, engine, base, precision)
    if out.exists() and not (out / RECORD).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} is there already and is no earlier export. Choose another --out.")
    with new_folder(out) as new:
        notes, told = write(new)
        save_record(
            new / RECORD,
            {
                "engine": engine,
                "kind": kind,
                "artifact": artifact.name,
                "artifact_sha256": artifact_sha256(artifact) if artifact.is_dir() else sha256(artifact),
                "notes": notes,
                "versions": versions(),
                "files_sha256": {name: sha256(new / name) for name in own_files(new)},
            },
        )
    return Shipped(engine, kind, out, own_files(out), notes, [line.replace("OUT", str(out)) for line in told])


_Writer = Callable[[Path], tuple[list[str], list[str]]]  # into a folder; (notes, how to load it)


def _writer(artifact: Path, engine: EngineName, base: str | None, precision: str) -> tuple[str, _Writer]:
    """What kind of artifact it is, and what writes it for the engine; everything that refuses it does so here."""
    if artifact.is_file() and artifact.suffix == ".safetensors":
        return "program", _program(artifact, engine)
    if not artifact.is_dir():
        raise ArtifactError(
            f"{artifact} is no adapter's or checkpoint's folder and no program's .safetensors file"
            + ("." if artifact.exists() else ": it does not exist.")
        )
    if (artifact / PROVENANCE).is_file():
        Provenance.read_unedited(artifact)
    if (artifact / PATCH_FILE).is_file():
        raise CannotLower(
            f"{artifact} is a patch of biases, whole weights or another architecture, which no engine's adapter holds. "
            "Run 'compile-steer merge', and export the merged folder."
        )
    if (artifact / ADAPTER_CONFIG).is_file():
        return "adapter", _adapter(artifact, engine, base)
    if (artifact / "config.json").is_file():
        return "checkpoint", _checkpoint(artifact, engine, precision)
    raise ArtifactError(f"{artifact} holds no {ADAPTER_CONFIG} and no config.json: no adapter, and no checkpoint.")


def _program(path: Path, engine: EngineName) -> _Writer:
    program = Program.load(path)
    if engine == "transformers":
        raise CannotLower(
            f"{path} is a program, not weights: transformers runs it under compile_steer's hooks, and no file of it. Run "
            "'compile-steer compile', and export the adapter or the merged folder."
        )
    vectors = shifts(program)
    if engine == "vllm":
        return _for_plugin(path, program)
    if 0 in vectors:
        raise CannotLower(
            f"{path} adds to the output of block 0, which llama.cpp's control vectors cannot: it refuses direction.0. "
            "Compile the program into weights instead."
        )
    name = f"{path.stem}.control.gguf"

    def write(folder: Path) -> tuple[list[str], list[str]]:
        notes = write_gguf(folder / name, program, _family(program.model) or "llama")
        return notes, [f"llama-cli -m BASE.gguf --control-vector OUT/{name}"]

    return write


def _for_plugin(path: Path, program: Program) -> _Writer:
    """vLLM has no hooks of its own; its plugin vllm-lens has."""
    name = f"{path.stem}.{PLUGIN}.json"

    def write(folder: Path) -> tuple[list[str], list[str]]:
        return write_vllm_lens(folder / name, program), [
            f"pip install {PLUGIN} && vllm serve {program.model}",
            f'"vllm_xargs": {{"apply_steering_vectors": TEXT OF OUT/{name}}} in a request, or in Python',
            f'SamplingParams(extra_args={{"apply_steering_vectors": Path("OUT/{name}").read_text()}})',
        ]

    return write


def _family(model: str) -> str | None:
    """The model's family, None where it is not at hand: a hint in a file, that llama.cpp does not read."""
    try:
        return str(_config(folder_of(model)).model_type)
    except CompileSteerError:
        return None


def _config(folder: Path) -> PreTrainedConfig:
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder} is no model of transformers ({str(error).splitlines()[0]}).") from error


def _adapter(folder: Path, engine: EngineName, base: str | None) -> _Writer:
    lora = read_lora(folder)
    named = base or lora.base
    family = _family(named) if named else None
    problems = adapter_refusals(engine, family, lora.max_rank)
    if engine == "llama.cpp" and family is None:
        problems.append(
            f"its base '{named}' is not at hand, and llama.cpp's file needs its family and heads. Name it with --base."
        )
    if problems:
        raise CannotLower([f"{folder}: {problem}" for problem in problems])
    if engine == "llama.cpp":
        return _lora_gguf(folder, lora, named)

    def write(new: Path) -> tuple[list[str], list[str]]:
        write_lora(new, lora.edits, named, lora.transposed)
        rank = read_lora(new).max_rank
        notes = _folded(lora)
        if {edit.rank for edit in lora.edits.values()} != {rank}:
            notes.append(f"all ranks are {rank} now, padded with zeros")
        if engine == "vllm":
            return notes, [f"vllm serve {named or 'BASE'} --enable-lora --lora-modules NAME=OUT --max-lora-rank {rank}"]
        return notes, [f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{named or "BASE"}"), "OUT")']

    return write


def _lora_gguf(folder: Path, lora: PlainLora, base: str) -> _Writer:
    name = f"{folder.name}.lora.gguf"

    def write(new: Path) -> tuple[list[str], list[str]]:
        write_lora_gguf(new / name, WeightPatch(lora.edits), _config(folder_of(base)))
        return _folded(lora), [f"llama-cli -m BASE.gguf --lora OUT/{name}"]

    return write


def _folded(lora: PlainLora) -> list[str]:
    """What of the adapter's settings is in its numbers now."""
    return [f"{', '.join(lora.folded)} folded into B: alpha is the rank now"] if lora.folded else []


def _checkpoint(folder: Path, engine: EngineName, precision: str) -> _Writer:
    problems = checkpoint_refusals(engine, _config(folder), Checkpoint(folder))
    if problems:
        raise CannotLower([f"{folder}: {problem}" for problem in problems])
    if engine == "llama.cpp":
        name = f"{folder.name}-{precision}.gguf"

        def convert(new: Path) -> tuple[list[str], list[str]]:
            write_gguf_file(new / name, WeightPatch(), load(str(folder), device="cpu"), precision, folder.name)
            return [], [f"llama-cli -m OUT/{name}"]

        return convert

    def copy(new: Path) -> tuple[list[str], list[str]]:
        for name in own_files(folder):
            if name not in _BESIDE:
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, new / name)
        return [], ["vllm serve OUT" if engine == "vllm" else 'AutoModelForCausalLM.from_pretrained("OUT")']

    return copy
