"""Write what one engine loads, in a form that it reads completely; or refuse, with the reasons.

Engines read few of an adapter's settings and few of a checkpoint's biases, and some drop the rest without a word. So
adapters become plain LoRA, and what an engine does not read is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from compile_steer.artifacts.files import own_files, read_json, save_record, sha256
from compile_steer.artifacts.provenance import CARD, PROVENANCE, EngineName, Provenance, artifact_sha256, versions
from compile_steer.artifacts.tensors import Checkpoint
from compile_steer.artifacts.writing import new_folder
from compile_steer.common.errors import ArtifactError, CannotLower, CompileSteerError, several, shell_word
from compile_steer.export.adapter import PATCH_FILE, write_lora
from compile_steer.export.engine_support import PLUGIN, Form, adapter_refusals, checkpoint_refusals, load_commands
from compile_steer.export.gguf import GGUF_KINDS, config_refusals, write_gguf_file, write_lora_gguf
from compile_steer.export.model_folder import copy_model, copy_side_files
from compile_steer.formats.lora import ADAPTER_CONFIG, PlainLora, read_lora
from compile_steer.models.checked import require_plain
from compile_steer.models.dequantise import read_dequantised
from compile_steer.models.libraries import quiet_library_errors, read_config, without_weights
from compile_steer.models.load import load
from compile_steer.models.older_readers import CONFIG, with_older_rope, write_settings
from compile_steer.models.source import find_model, folder_of
from compile_steer.steering.low_rank import linear_shape
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.tools.vector_files import block_vectors, write_gguf, write_vllm_lens
from compile_steer.verification.parity import own_parity

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


def export_base(model: str, out: Path, dequantize: bool = False) -> Exported:
    """Write a model to `out` as a plain folder, a GGUF file's weights de-quantised: what adapters are loaded on.

    Args:
        dequantize: the weights in its folder are of few bits, and are written in bfloat16.

    Raises `RecipeError` where it is not there, `ArtifactError` where it is no whole model or something is at `out`.
    """
    source = find_model(model)
    _config(source.folder)
    plain = read_dequantised(source.folder) if dequantize else None
    if plain is None:
        require_plain(source.folder)
    _require_free(out)
    with new_folder(out) as new:
        if plain is None:
            copy_model(source.folder, new)
        else:
            copy_side_files(source.folder, new)
            with quiet_library_errors(lambda reason: ArtifactError(f"{out} cannot be written ({reason}).")):
                plain.save_pretrained(new)
            content = read_json(new / CONFIG, "")
            write_settings(new / CONFIG, with_older_rope({**content, "torch_dtype": content["dtype"]}))
        if source.license:
            (new / CARD).write_text(f"---\nlicense: {source.license}\n---\n", encoding="utf-8")
    notes = [f"licence: {source.license}" if source.license else "its licence is not named in its files"]
    return Exported(
        "transformers",
        "checkpoint",
        out,
        own_files(out),
        notes,
        load_commands("transformers", "checkpoint", folder=out),
    )


def export(
    artifact: Path,
    engine: EngineName,
    out: Path,
    base: str | None = None,
    precision: str = "f16",
    force: bool = False,
) -> Exported:
    """Write to the folder `out` what `engine` loads of an adapter, a checkpoint or a program; whole or not at all.

    Args:
        base: the adapter's base model, where the adapter does not name it.
        precision: of a checkpoint for llama.cpp, one of `GGUF_KINDS`.
        force: export also what failed its verification.

    Raises:
        ArtifactError: the artifact is damaged, was changed after it was written, or is none of the three.
        CannotLower: it failed its verification, or the engine would load it wrongly or not at all; every reason is named.
    """
    artifact = artifact if artifact.name else artifact.absolute()  # files are called by its name, and '.' has none
    # Precision and base are checked also where they are not used: a typing error should not pass.
    if precision not in GGUF_KINDS:
        raise ArtifactError(f"--precision {precision}: needed: {', '.join(GGUF_KINDS)}.")
    # A base that is named must be one; that which the adapter names may be on another machine.
    if base:
        _config(folder_of(base))
    kind = _kind(artifact)
    verified = _verification(artifact, force)
    if not (out / RECORD).is_file():
        _require_free(out)
    with new_folder(out) as new:  # a refusal leaves what was at `out`
        if kind == "program":
            notes, names = _export_program(artifact, engine, new)
        elif kind == "adapter":
            notes, names = _export_adapter(artifact, engine, new, base)
        else:
            notes, names = _export_checkpoint(artifact, engine, new, precision)
        notes += verified
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
    before: tuple[str, ...] = ()
    if engine == "llama.cpp" and kind != "checkpoint":
        names["base"], before = _base_as_gguf(str(names["base"]), out, precision)
    load = (*before, *load_commands(engine, kind, folder=out, **names))
    return Exported(engine, kind, out, own_files(out), notes, load)


def _base_as_gguf(base: str, out: Path, precision: str) -> tuple[str, tuple[str, ...]]:
    """The path of the base's GGUF file, and the line that writes it; without a line where the base is not at hand."""
    try:
        folder = find_model(base).folder
    except CompileSteerError:
        return "BASE.gguf", ()
    to = out.with_name(f"{out.name}-base")
    line = f"compile-steer export {shell_word(folder)} --for llama.cpp --precision {precision} --out {shell_word(to)}"
    return str(to / f"{folder.name}-{precision}.gguf"), (line,)


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} is there already and is no earlier export. Choose another --out.")


def _verification(artifact: Path, force: bool) -> list[str]:
    """What is to be noted of the verification of an artifact of ours; raises `CannotLower` where it failed, without `force`."""
    if not (artifact / PROVENANCE).is_file():
        return []
    parity = own_parity(artifact)
    if parity is None:
        return ["not verified: 'compile-steer verify' compares it with the steered model"]
    if parity.passed:
        return []
    if not force:
        raise CannotLower(
            [f"{artifact} failed its verification: {reason}." for reason in parity.reasons]
            + ["Compile it in another way, or export it all the same with --force."]
        )
    return [f"it FAILED its verification: {'; '.join(parity.reasons)}"]


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
        notes = write_gguf(new / name, program, _at_hand(program.model)[1] or "llama")
    return notes, {"file": name, "base": _at_hand(program.model)[0]}


def _export_adapter(folder: Path, engine: EngineName, new: Path, named: str | None) -> tuple[list[str], _Names]:
    """`named` is the base that the user names; None for that which the adapter names."""
    lora = read_lora(folder)
    base, family = _at_hand(named or lora.base)
    problems = adapter_refusals(engine, family, lora.max_rank)
    if engine == "llama.cpp" and family is None:
        problems.append(
            f"its base '{base}' is not at hand, and llama.cpp's file needs its family and heads. Name it with --base."
        )
    if problems:
        raise CannotLower([f"{folder}: {problem}" for problem in problems])
    if family is not None and (misfits := several(list(_misfits(lora, folder_of(named or lora.base))))):
        raise ArtifactError(
            [f"{folder}: {problem}. Name the base that it was made for (--base)." for problem in misfits]
        )
    notes = [f"{', '.join(lora.folded)} folded into B: alpha is the rank now"] if lora.folded else []
    if engine == "llama.cpp":
        name = f"{folder.name}.lora.gguf"
        write_lora_gguf(new / name, WeightPatch(lora.edits), _config(folder_of(named or lora.base)))
        return notes, {"file": name, "base": base}
    write_lora(new, lora.edits, base, lora.transposed)
    rank = read_lora(new).max_rank
    if {edit.rank for edit in lora.edits.values()} != {rank}:
        notes.append(f"all ranks are {rank} now, padded with zeros")
    return notes, {"base": base or "BASE", "name": "NAME", "rank": rank}


def _misfits(lora: PlainLora, base: Path) -> Iterator[str]:
    """Every edit that the base at hand has no matrix of that shape for; an engine would ignore it, or fail."""
    modules = dict(without_weights(_config(base)).named_modules(remove_duplicate=False))
    # Older adapters may name matrices as the files do, where the library has joined or renamed them since.
    specs = Checkpoint(base).specs
    for name, edit in lora.edits.items():
        weight = getattr(modules.get(name), "weight", None)
        held = specs[f"{name}.weight"][1] if weight is None and f"{name}.weight" in specs else None
        if weight is not None:
            held = list(linear_shape(modules[name])) if weight.ndim == 2 else list(weight.shape)
        needed = [len(edit.B), edit.A.shape[1]]
        if held != needed:
            yield f"{name}: the adapter's change is {needed}, the base {'has none' if held is None else held}"


def _export_checkpoint(folder: Path, engine: EngineName, new: Path, precision: str) -> tuple[list[str], _Names]:
    problems = checkpoint_refusals(engine, _config(folder), Checkpoint(folder))
    problems += config_refusals(_config(folder), str(folder)) if engine == "llama.cpp" else []
    if problems:
        raise CannotLower([f"{folder}: {problem}" for problem in problems])
    if engine == "llama.cpp":
        name = f"{folder.name}-{precision}.gguf"
        write_gguf_file(new / name, WeightPatch(), load(str(folder), device="cpu"), precision, folder.name)
        return [], {"file": name}
    copy_model(folder, new)
    return [], {}


def _at_hand(model: str) -> tuple[str, str | None]:
    """What other tools load the model by, and its family; the name as it is and None where it is not at hand."""
    try:
        source = find_model(model)
        return source.loadable, str(_config(source.folder).model_type)
    except CompileSteerError:
        return model, None


def _config(folder: Path) -> PreTrainedConfig:
    with quiet_library_errors(lambda reason: ArtifactError(f"{folder} is no model of transformers ({reason}).")):
        return read_config(folder)
