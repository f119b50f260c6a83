"""Does an engine compute what transformers does? The log-probabilities of fixed texts, token by token.

That an engine loaded a file says nothing: some serve the base without a word. So what steering changes in the engine is
held against what it changes in transformers, and the error against the engine's own on the base in the same format.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from compile_steer.artifacts.provenance import PROVENANCE, EngineRecord, Provenance
from compile_steer.common.errors import ArtifactError, CompileSteerError, EngineError
from compile_steer.common.progress import Progress
from compile_steer.export.engine_support import PLUGIN
from compile_steer.export.gguf import write_gguf_file
from compile_steer.formats.lora import ADAPTER_CONFIG
from compile_steer.models.load import LoadedModel, folder_of, load
from compile_steer.models.logprobs import reference_logprobs, reference_tokens
from compile_steer.models.reload import reload
from compile_steer.steering.hooks import steered
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.tools.serving.environment import Environment
from compile_steer.tools.serving.export import Shipped, ship
from compile_steer.tools.serving.runner import WORKERS, Answer, run_worker

# Of these many, that many tokens a round: short, so that what else a machine does falls on all forms alike.
PROMPTS, WRITTEN = 2, 16


def compare(
    artifact: Path, base: str | None, engines: Sequence[Environment], precision: str, limit_s: float, progress: Progress
) -> list[EngineRecord]:
    """Hold what each engine computes of an artifact against transformers; one that fails is a reading that says so.

    Args:
        artifact: an adapter, a checkpoint, or a program, as `ship` takes it.
        base: what it was made from; None where the artifact says it.
        precision: of the GGUF files of base and checkpoint.

    Raises:
        ArtifactError: the artifact cannot be read, or its base is not said.
    """
    loaded = load(base or recorded_base(artifact), device="cpu")
    sequences, found = reference_tokens(loaded), []
    with progress.phase("asking the engines", len(engines)) as advance:
        for engine in engines:
            found.append(_reading(engine, artifact, loaded, precision, sequences, limit_s))
            advance(1)
    return found


def recorded_base(artifact: Path) -> str:
    """The base that an artifact names; raises `ArtifactError` where it names none."""
    if artifact.is_file():
        return Program.load(artifact).model
    if (artifact / PROVENANCE).is_file():
        return Provenance.read(artifact).model
    if (artifact / ADAPTER_CONFIG).is_file():
        named = json.loads((artifact / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if named:
            return str(named)
    raise ArtifactError(f"{artifact} does not say what it was made from. Name it with --base.")


def reference(
    artifact: Path, base: LoadedModel, sequences: Sequence[Sequence[int]], files: tuple[Path, Path] | None = None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Log-probabilities of base and artifact under stock transformers, or of a program under hooks.

    Args:
        files: folders of the GGUF files of base and artifact, where these are rounded: what they hold is then what is
            computed with, so that only the engine's own arithmetic is left to differ. None for the artifact itself.
    """
    if files is None:
        plain = reference_logprobs(base.model, sequences)
        if artifact.is_dir():
            return plain, reference_logprobs(reload(artifact, base).model, sequences)
        return plain, _under_hooks(artifact, base, base, sequences)
    rounded = reload(files[0], base)
    plain = reference_logprobs(rounded.model, sequences)
    if artifact.is_file():
        return plain, _under_hooks(artifact, base, rounded, sequences)
    if (artifact / ADAPTER_CONFIG).is_file():
        return plain, reference_logprobs(PeftModel.from_pretrained(rounded.model, str(artifact)).eval(), sequences)
    return plain, reference_logprobs(reload(files[1], base).model, sequences)


def _under_hooks(
    path: Path, base: LoadedModel, run: LoadedModel, sequences: Sequence[Sequence[int]]
) -> np.ndarray[Any, Any]:
    program = Program.load(path)
    base.layout.require_program(program, base.id, base.revision)
    with steered(run.model, program):
        return reference_logprobs(run.model, sequences)


def _reading(
    engine: Environment, artifact: Path, base: LoadedModel, precision: str, sequences: list[list[int]], limit_s: float
) -> EngineRecord:
    form = artifact.name + (f" ({precision})" if engine.name == "llama.cpp" else "")
    try:
        with tempfile.TemporaryDirectory(prefix="compile-steer-engines-") as folder:
            return readings(engine, {form: artifact}, base, precision, sequences, Path(folder), limit_s)[0]
    except CompileSteerError as error:
        return EngineRecord(engine.name, form, problem=" ".join(error.problems))


def readings(
    engine: Environment,
    forms: Mapping[str, Path],
    base: LoadedModel,
    precision: str,
    sequences: list[list[int]],
    folder: Path,
    limit_s: float,
) -> list[EngineRecord]:
    """Several artifacts of one base, by name, in one engine; one that it cannot load is a reading that says so.

    Args:
        folder: where the files for the engine are written; an empty one.

    Raises:
        EngineError: the engine crashed, hung, or left no answer.
    """
    found: list[EngineRecord] = []
    shipped: dict[str, Shipped] = {}
    for name, artifact in forms.items():
        try:
            if engine.name == "vllm" and artifact.is_file() and PLUGIN not in engine.versions:
                raise EngineError(f"{PLUGIN} is not installed in {engine.folder}. Run 'make engines ENGINE=vllm'.")
            shipped[name] = ship(artifact, engine.name, folder / f"form-{len(shipped)}", base.source, precision)
        except CompileSteerError as error:
            found.append(EngineRecord(engine.name, name, problem=" ".join(error.problems)))
    if not shipped:
        return found
    written = written_base(engine, base, folder / "base", precision)
    answer = ask(engine, jobs(engine, written, list(shipped.values()), list(shipped)), sequences, limit_s)
    rounded = engine.name == "llama.cpp" and precision != "f32"
    for name, one in shipped.items():
        files = (written.parent, one.folder) if rounded else None
        plain, wanted = reference(forms[name], base, sequences, files)
        reading = held_against(engine.name, name, answer.arrays["base"], answer.arrays[name], plain, wanted)
        found.append(replace(reading, version=str(engine)))
    return found


def held_against(
    engine: str,
    form: str,
    found_base: np.ndarray[Any, Any],
    found: np.ndarray[Any, Any],
    wanted_base: np.ndarray[Any, Any],
    wanted: np.ndarray[Any, Any],
) -> EngineRecord:
    """An engine's log-probabilities [n] of base and form against transformers'."""
    effect, seen = wanted - wanted_base, found - found_base
    size = float(effect @ effect)
    return EngineRecord(
        engine,
        form,
        len(wanted),
        float(np.abs(found - wanted).max()),
        float(np.sqrt(np.square(found - wanted).mean())),
        float(np.abs(found_base - wanted_base).max()),
        float(np.sqrt(np.square(found_base - wanted_base).mean())),
        float(np.abs(effect).max()),
        float(effect @ seen) / size if size else float("nan"),
    )


def written_base(engine: Environment, base: LoadedModel, folder: Path, precision: str) -> Path:
    """The base as the engine loads it: its folder, or a GGUF file written to `folder`."""
    if engine.name == "vllm":
        return folder_of(base.source)
    folder.mkdir(exist_ok=True)
    path = folder / f"base-{precision}.gguf"
    write_gguf_file(path, WeightPatch(), base, precision, "base")
    return path


def jobs(engine: Environment, base: Path, shipped: Sequence[Shipped], names: Sequence[str]) -> list[dict[str, Any]]:
    """What the engine's worker is to load: the base, then each form by its name."""
    where = "folder" if engine.name == "vllm" else "file"
    found: list[dict[str, Any]] = [{"name": "base", where: str(base.absolute())}]
    for name, one in zip(names, shipped, strict=True):
        place = one.folder.absolute()
        gguf = next((str(place / file) for file in one.files if file.endswith(".gguf")), "")
        match engine.name, one.kind:
            case "vllm", "adapter":
                rank = json.loads((place / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"]
                found.append({"name": name, where: str(base.absolute()), "adapter": str(place), "rank": rank})
            case "vllm", "program":
                vectors = str(place / next(file for file in one.files if file.endswith(f"{PLUGIN}.json")))
                found.append({"name": name, where: str(base.absolute()), "steering": vectors})
            case "vllm", _:
                found.append({"name": name, where: str(place)})
            case _, "checkpoint":
                found.append({"name": name, where: gguf})
            case _, kind:
                beside = "adapter" if kind == "adapter" else "control_vector"
                found.append({"name": name, where: str(base.absolute()), beside: gguf})
    return found


def ask(
    engine: Environment,
    models: Sequence[dict[str, Any]],
    sequences: Sequence[Sequence[int]],
    limit_s: float,
    timed: Sequence[str] = (),
    rounds: int = 0,
) -> Answer:
    """Run the engine's worker: log-probabilities of every model, and tokens a second of those named in `timed`.

    Raises:
        EngineError: it crashed, hung, or left no answer.
    """
    script = WORKERS / ("vllm_worker.py" if engine.name == "vllm" else "llama_cpp_worker.py")
    new_tokens = WRITTEN if timed else 1
    context = max(len(ids) for ids in sequences) + new_tokens
    job = {
        "models": models,
        "timed": timed,
        "rounds": rounds,
        "prompts": PROMPTS,
        "new_tokens": new_tokens,
        "context": context,
    }
    arrays = {
        "ids": np.concatenate([np.asarray(ids, dtype=np.int64) for ids in sequences]),
        "lengths": np.array([len(ids) for ids in sequences]),
    }
    return run_worker(engine, script, job, arrays, limit_s)
