"""Does an engine compute what transformers does? The log-probabilities of fixed texts, token by token.

That an engine loaded a file shows nothing: some serve the base without a word. So the change by steering in the engine is
compared with the change in transformers, and the engine's error with its own error on the base in the same format.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import PROVENANCE, EngineRecord, Provenance, save_engine_records
from compile_steer.common.errors import ArtifactError, CompileSteerError, EngineError, library_errors
from compile_steer.common.progress import Progress
from compile_steer.export.engine_support import PLUGIN
from compile_steer.export.gguf import write_gguf_file
from compile_steer.formats.lora import ADAPTER_CONFIG, AdapterConfig, LoraConfig, read_lora
from compile_steer.models.fingerprint import reference_logprobs, reference_tokens
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.reload import reload, require_own_files
from compile_steer.models.source import folder_of
from compile_steer.report.card import update_card
from compile_steer.steering.hooks import steered
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.tools.serving.export import Exported, export
from compile_steer.tools.serving.runner import WORKERS, Environment, run_worker

Array = np.ndarray[Any, Any]


def compare_engines(
    artifact: Path, base: str | None, engines: Sequence[Environment], precision: str, limit_s: float, progress: Progress
) -> list[EngineRecord]:
    """Compare what each engine computes of an artifact with transformers; of one that fails the record has the problem.

    The records are kept beside an artifact of ours, and shown on its card.

    Args:
        artifact: an adapter, a checkpoint, or a program, as `export` takes it.
        base: what it was made from; None where the artifact names it.
        precision: of the GGUF files of base and checkpoint.

    Raises:
        ArtifactError: the artifact cannot be read, or does not name its base.
    """
    if (artifact / ADAPTER_CONFIG).is_file():
        read_lora(artifact)  # what is no plain LoRA is the input's fault, not an engine's
    loaded = load(base or recorded_base(artifact), device="cpu")
    sequences, records = reference_tokens(loaded), []  # token ids: engines need not split text alike
    with progress.phase("running the engines", len(engines)) as advance:
        for engine in engines:
            form = artifact.name + (f" ({precision})" if engine.name == "llama.cpp" else "")
            try:
                with tempfile.TemporaryDirectory(prefix="compile-steer-engines-") as folder:
                    forms = {form: artifact}
                    records += measure_forms(engine, forms, loaded, precision, sequences, Path(folder), limit_s)
            except CompileSteerError as error:  # the other engines still run
                records.append(EngineRecord(engine.name, form, problem=" ".join(error.problems)))
            advance(1)
    if save_engine_records(artifact, records):
        update_card(artifact, RunPaths.of_artifact(artifact, Provenance.read(artifact).name).validation)
    return records


def recorded_base(artifact: Path) -> str:
    """The base that an artifact names; raises `ArtifactError` where it names none."""
    if artifact.is_file():
        return Program.load(artifact).model
    if (artifact / PROVENANCE).is_file():
        return Provenance.read(artifact).model
    if (artifact / ADAPTER_CONFIG).is_file():
        base = AdapterConfig.read(artifact).base_model_name_or_path
        if base:
            return base
    raise ArtifactError(f"{artifact} does not say what it was made from. Name it with --base.")


def measure_forms(
    engine: Environment,
    forms: Mapping[str, Path],
    base: LoadedModel,
    precision: str,
    sequences: list[list[int]],
    folder: Path,
    limit_s: float,
) -> list[EngineRecord]:
    """Compare several artifacts of one base, by name, in one engine; one that cannot be exported gets a record saying so.

    The engine's files are written to the empty `folder`. Raises `EngineError` if it crashed, hung, or left no answer.
    """
    records: list[EngineRecord] = []
    exported: dict[str, Exported] = {}
    for name, artifact in forms.items():
        try:
            if engine.name == "vllm" and artifact.is_file() and PLUGIN not in engine.versions:
                raise EngineError(f"{PLUGIN} is not installed in {engine.folder}. Run 'make engines ENGINE=vllm'.")
            out = folder / f"form-{len(exported)}"
            exported[name] = export(artifact, engine.name, out, base.source, precision, force=True)  # to be measured
        except CompileSteerError as error:
            records.append(EngineRecord(engine.name, name, problem=" ".join(error.problems)))
    if not exported:
        return records
    base_path = engine_base(engine, base, folder / "base", precision)
    models = [engine_model(engine, "base", base_path)]
    models += [engine_model(engine, name, base_path, form) for name, form in exported.items()]
    job = {"models": models, "context": max(map(len, sequences)) + 1}
    ids = {"ids": np.concatenate(sequences), "lengths": np.array([len(sequence) for sequence in sequences])}
    _content, arrays = run_worker(engine, worker_of(engine), job, ids, limit_s)
    # A rounded file is compared with transformers on its own numbers: the rounding is no error of the engine.
    rounded = engine.name == "llama.cpp" and precision != "f32"
    for name, form in exported.items():
        files = (base_path.parent, form.folder) if rounded else None
        expected_base, expected = expected_logprobs(forms[name], base, sequences, files)
        record = engine_record(engine.name, name, arrays["base"], arrays[name], expected_base, expected)
        records.append(replace(record, version=str(engine)))
    return records


def expected_logprobs(
    artifact: Path, base: LoadedModel, sequences: Sequence[Sequence[int]], files: tuple[Path, Path] | None = None
) -> tuple[Array, Array]:
    """Log-probabilities of base and artifact under stock transformers, or of a program under hooks, each [n] in nats.

    Args:
        files: folders of the rounded GGUF files of base and artifact. Transformers then computes with the numbers that
            they hold, so that only the engine's own arithmetic differs. None for the artifact itself.
    """
    rounded = base if files is None else reload(files[0], base)
    plain = reference_logprobs(rounded.model, sequences)
    if artifact.is_file():
        program = Program.load(artifact)
        base.layout.require_program(program, base.id, base.revision)  # a de-quantised copy has another revision
        with steered(rounded.model, program):
            return plain, reference_logprobs(rounded.model, sequences)
    if files is not None and (artifact / ADAPTER_CONFIG).is_file():
        from peft import PeftModel

        require_own_files(artifact, rounded.model)
        with library_errors(lambda reason: ArtifactError(f"{artifact} cannot be loaded by PEFT ({reason}).")):
            adapted = PeftModel.from_pretrained(rounded.model, str(artifact)).eval()
        return plain, reference_logprobs(adapted, sequences)
    return plain, reference_logprobs(reload(artifact if files is None else files[1], base).model, sequences)


def engine_record(
    engine: str, form: str, base: Array, actual: Array, expected_base: Array, expected: Array
) -> EngineRecord:
    """Compare an engine's log-probabilities [n] of base and form with those of transformers."""
    effect, engine_effect = expected - expected_base, actual - base
    size = float(effect @ effect)
    return EngineRecord(
        engine,
        form,
        tokens=len(expected),
        error=float(np.abs(actual - expected).max()),
        rms=float(np.sqrt(np.square(actual - expected).mean())),
        base_error=float(np.abs(base - expected_base).max()),
        base_rms=float(np.sqrt(np.square(base - expected_base).mean())),
        effect=float(np.abs(effect).max()),  # without one the comparison shows nothing
        gain=float(effect @ engine_effect) / size if size else float("nan"),
    )


def engine_base(engine: Environment, base: LoadedModel, folder: Path, precision: str) -> Path:
    """The base as the engine loads it: its folder, or a GGUF file that is written to `folder`."""
    if engine.name == "vllm":
        return folder_of(base.source)
    folder.mkdir(exist_ok=True)
    path = folder / f"base-{precision}.gguf"
    write_gguf_file(path, WeightPatch(), base, precision, "base")
    return path


def engine_model(engine: Environment, name: str, base: Path, form: Exported | None = None) -> dict[str, Any]:
    """What the engine's worker loads as `name`: the base, or the base with what was exported, or a checkpoint."""
    key = "folder" if engine.name == "vllm" else "file"
    model: dict[str, Any] = {"name": name, key: str(base.absolute())}
    if form is None:
        return model
    folder = form.folder.absolute()
    files = [str(folder / file) for file in form.files if file.endswith((".gguf", f"{PLUGIN}.json"))]
    if form.kind == "checkpoint":
        model[key] = files[0] if files else str(folder)
    elif engine.name == "llama.cpp":
        model["adapter" if form.kind == "adapter" else "control_vector"] = files[0]
    elif form.kind == "program":
        model["steering"] = files[0]
    else:
        model |= {"adapter": str(folder), "rank": LoraConfig.read(folder).r}
    return model


def worker_of(engine: Environment) -> Path:
    """The script that an engine's own interpreter runs."""
    return WORKERS / ("vllm_worker.py" if engine.name == "vllm" else "llama_cpp_worker.py")
