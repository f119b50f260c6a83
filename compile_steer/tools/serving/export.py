"""Write what one engine loads, in a form that it reads completely; or refuse, with the reasons.

Engines read few of an adapter's settings and few of a checkpoint's biases, and some drop the rest without a word. So
adapters become plain LoRA, and what an engine does not read is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from compile_steer.artifacts.files import own_files, save_record, sha256
from compile_steer.artifacts.provenance import PROVENANCE, EngineName, Provenance, artifact_sha256, versions
from compile_steer.artifacts.tensors import Checkpoint
from compile_steer.artifacts.writing import new_folder
from compile_steer.common.errors import ArtifactError, CannotLower, CompileSteerError
from compile_steer.export.adapter import PATCH_FILE, write_lora
from compile_steer.export.engine_support import PLUGIN, Form, adapter_refusals, checkpoint_refusals, load_commands
from compile_steer.export.gguf import GGUF_KINDS, write_gguf_file, write_lora_gguf
from compile_steer.export.model_folder import copy_model
from compile_steer.formats.lora import ADAPTER_CONFIG, read_lora
from compile_steer.models.libraries import quiet_library_errors, read_config
from compile_steer.models.load import folder_of, load
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.tools.vector_files import block_vectors, write_gguf, write_vllm_lens

RECORD = "export.json"


@dataclass(frozen=True)
class Exported:
    """What was written: the form of the artifact, files below `folder`, what was changed, and how to load it."""

    engine: EngineName
    kind: Form
    folder: Path
    files: list[str]
    notes: list[str]
    load: tuple[str, ...]


def export(artifact: Path, engine: EngineName, out: Path, base: str | None = None, precision: str = "f16") -> Exported:
    """Write to the folder `out` what `engine` loads of an adapter, a checkpoint or a program; whole or not at all.

    Args:
        base: the adapter's base model, where the adapter does not name it.
        precision: of a checkpoint for llama.cpp, one of `GGUF_KINDS`.

    Raises:
        ArtifactError: the artifact is damaged, was changed after it was written, or is none of the three.
        CannotLower: the engine would load it wrongly or not at all; every reason is named.
    """
    # Precision and base are checked also where they are not used: a typing error should not pass.
    if precision not in GGUF_KINDS:
        raise ArtifactError(f"--precision {precision}: needed: {', '.join(GGUF_KINDS)}.")
    # A base that is named must be one; that which the adapter names may be on another machine.
    family = str(_config(folder_of(base)).model_type) if base else None
    kind = _kind(artifact)
    if out.exists() and not (out / RECORD).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} is there already and is no earlier export. Choose another --out.")
    with new_folder(out) as new:  # a refusal leaves what was at `out`
        if kind == "program":
            notes, names = _export_program(artifact, engine, new)
        elif kind == "adapter":
            notes, names = _export_adapter(artifact, engine, new, base, family)
        else:
            notes, names = _export_checkpoint(artifact, engine, new, precision)
        record = {
            "engine": engine,
            "kind": kind,
            "artifact": artifact.name,
            "artifact_sha256": artifact_sha256(artifact) if artifact.is_dir() else sha256(artifact),
            "notes": notes,
            "versions": versions(),
            "files_sha256": {name: sha256(new / name) for name in own_files(new)},
        }
        save_record(new / RECORD, record)
    return Exported(engine, kind, out, own_files(out), notes, load_commands(engine, kind, folder=out, **names))


_Names = dict[str, object]  # what the commands that load the files name


def _kind(artifact: Path) -> Form:
    """The form of an artifact that is as it was written; raises `ArtifactError` for any other path."""
    if artifact.is_file() and artifact.suffix == ".safetensors":
        return "program"
    if not artifact.is_dir():
        raise ArtifactError(
            f"{artifact} is no adapter's or checkpoint's folder and no program's .safetensors file"
            + ("." if artifact.exists() else ": it does not exist.")
        )
    if (artifact / PROVENANCE).is_file():  # of other artifacts there is nothing to compare with
        Provenance.read_unedited(artifact)
    if (artifact / PATCH_FILE).is_file():
        raise CannotLower(
            f"{artifact} is a patch of biases, whole weights or another architecture, which no engine's adapter holds. "
            "Run 'compile-steer merge', and export the merged folder."
        )
    if (artifact / ADAPTER_CONFIG).is_file():
        return "adapter"
    if (artifact / "config.json").is_file():
        return "checkpoint"
    raise ArtifactError(f"{artifact} holds no {ADAPTER_CONFIG} and no config.json: no adapter, and no checkpoint.")


def _export_program(path: Path, engine: EngineName, new: Path) -> tuple[list[str], _Names]:
    program = Program.load(path)
    if engine == "transformers":
        raise CannotLower(
            f"{path} is a program, not weights: transformers runs it under compile_steer's hooks, and no file of it. Run "
            "'compile-steer compile', and export the adapter or the merged folder."
        )
    if engine == "vllm":
        name = f"{path.stem}.{PLUGIN}.json"
        notes = write_vllm_lens(new / name, program)
    elif 0 in block_vectors(program):
        raise CannotLower(
            f"{path} adds to the output of block 0, which llama.cpp's control vectors cannot: it refuses direction.0. "
            "Compile the program into weights instead."
        )
    else:
        name = f"{path.stem}.control.gguf"
        # llama.cpp does not read the family, so a guess does no harm where the base is not at hand.
        notes = write_gguf(new / name, program, _family(program.model) or "llama")
    return notes, {"file": name, "base": program.model}


def _export_adapter(
    folder: Path, engine: EngineName, new: Path, base: str | None, family: str | None
) -> tuple[list[str], _Names]:
    """`base` is the model that the user names, of `family`; None for that which the adapter names."""
    lora = read_lora(folder)
    if base is None and lora.base:
        base, family = lora.base, _family(lora.base)
    base = base or lora.base
    problems = adapter_refusals(engine, family, lora.max_rank)
    if engine == "llama.cpp" and family is None:
        problems.append(
            f"its base '{base}' is not at hand, and llama.cpp's file needs its family and heads. Name it with --base."
        )
    if problems:
        raise CannotLower([f"{folder}: {problem}" for problem in problems])
    notes = [f"{', '.join(lora.folded)} folded into B: alpha is the rank now"] if lora.folded else []
    if engine == "llama.cpp":
        name = f"{folder.name}.lora.gguf"
        write_lora_gguf(new / name, WeightPatch(lora.edits), _config(folder_of(base)))
        return notes, {"file": name}
    write_lora(new, lora.edits, base, lora.transposed)
    rank = read_lora(new).max_rank
    if {edit.rank for edit in lora.edits.values()} != {rank}:
        notes.append(f"all ranks are {rank} now, padded with zeros")
    return notes, {"base": base or "BASE", "name": "NAME", "rank": rank}


def _export_checkpoint(folder: Path, engine: EngineName, new: Path, precision: str) -> tuple[list[str], _Names]:
    problems = checkpoint_refusals(engine, _config(folder), Checkpoint(folder))
    if problems:
        raise CannotLower([f"{folder}: {problem}" for problem in problems])
    if engine == "llama.cpp":
        name = f"{folder.name}-{precision}.gguf"
        write_gguf_file(new / name, WeightPatch(), load(str(folder), device="cpu"), precision, folder.name)
        return [], {"file": name}
    copy_model(folder, new)
    return [], {}


def _family(model: str) -> str | None:
    """The model's family; None where the model is not at hand."""
    try:
        return str(_config(folder_of(model)).model_type)
    except CompileSteerError:
        return None


def _config(folder: Path) -> PreTrainedConfig:
    with quiet_library_errors(lambda reason: ArtifactError(f"{folder} is no model of transformers ({reason}).")):
        return read_config(folder)
