"""What serving engines compute of the files that are written for them: the ocean program, compiled and not.

    python -m benchmarks.engines

Needs what `make engines` installs; without it, it says what is missing and writes nothing. Takes about half an hour on a
quiet machine; what was found is kept, and a run that was stopped goes on. Remove docs/engines.jsonl to begin anew.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import bootstrap

from benchmarks import speed_worker
from benchmarks.record import ROOT, Record, prose, table
from compile_steer.artifacts.provenance import EngineRecord, Provenance
from compile_steer.common.errors import EngineError
from compile_steer.export.adapter import read_patch
from compile_steer.export.gguf import GGUF_KINDS
from compile_steer.export.merged import write_merged
from compile_steer.lowering.exact import bias_patch
from compile_steer.models.fingerprint import REFERENCE_TEXTS, reference_tokens
from compile_steer.models.generate import neutral_generation
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.reload import reload
from compile_steer.steering.hooks import steered
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.tools.serving.compare import engine_base, engine_model, measure_forms, worker_of
from compile_steer.tools.serving.export import export
from compile_steer.tools.serving.runner import ENGINES, Environment, environment, run_worker

SPEED, SPEED_WORKER = "speed", Path(speed_worker.__file__)
# Of these many, that many tokens a round: short, so that what else a machine does falls on all forms alike.
PROMPTS, NEW_TOKENS = 2, 16
PROGRAM = ROOT / "vectors" / "ocean.safetensors"
ADAPTER = ROOT / "adapters" / "ocean-closed_form"
ADAPTED, FOREIGN, MERGED, BIASED, UNCOMPILED = (
    "adapter",
    "the same saved as rank 3, rsLoRA, with an alpha of its own for o_proj",
    "adapter, merged, fp32",
    "exact bias, merged, fp32",
    "uncompiled program",
)
LIMIT_S = 900
AGAIN = "base, loaded again"
ROUNDS = 24


@dataclass(frozen=True)
class Finding:
    """One reading of an engine, or (as `precision` SPEED) tokens a second by form, a value a round."""

    engine: str
    precision: str
    reading: EngineRecord | None = None
    times: dict[str, list[float]] = field(default_factory=dict)
    load_average: float = 0.0


def forms(folder: Path, one: LoadedModel) -> dict[str, Path]:
    """The ocean program in every form that lies on disk, by name."""
    program = canonical(Program.load(PROGRAM))
    origin = replace(Provenance.read(ADAPTER), form="merged-fp32")
    patches: dict[str, WeightPatch] = {MERGED: read_patch(ADAPTER), BIASED: bias_patch(program, one.layout)}
    for name, patch in patches.items():
        write_merged(folder / name, patch, one, "fp32", origin, "")
    merged = {name: folder / name for name in patches}
    return {ADAPTED: ADAPTER, FOREIGN: as_others_save_it(folder / "foreign"), **merged, UNCOMPILED: PROGRAM}


def as_others_save_it(folder: Path) -> Path:
    """The example's very edit as a PEFT folder of another kind: engines misread some of these settings."""
    folder.mkdir()
    config = json.loads((ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    settings = {"r": 3, "lora_alpha": 5, "use_rslora": True, "alpha_pattern": {"o_proj": 2}}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}), encoding="utf-8")
    tensors = {}
    for name, tensor in load_file(ADAPTER / "adapter_model.safetensors").items():
        if "lora_A" in name:
            tensors[name] = torch.cat([tensor, torch.zeros(3 - tensor.shape[0], tensor.shape[1])])
        else:
            scale = (2 if "o_proj" in name else 5) / 3**0.5
            tensors[name] = torch.cat([tensor, torch.zeros(tensor.shape[0], 3 - tensor.shape[1])], dim=1) / scale
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def speeds(engine: Environment, one: LoadedModel, made: Mapping[str, Path], folder: Path) -> dict[str, list[float]]:
    """Tokens a second of base, merged model and adapter in an engine, a value a round."""
    exported = {name: export(made[name], engine.name, folder / name, one.source, "f32") for name in (BIASED, ADAPTED)}
    base = engine_base(engine, one, folder / "base", "f32")
    again = folder / "again"
    again.symlink_to(base)  # one path is one model to vLLM
    models = [engine_model(engine, "base", base), engine_model(engine, AGAIN, again)]
    models += [engine_model(engine, name, base, form) for name, form in exported.items()]
    job = {
        "worker": str(worker_of(engine)),
        "models": models,
        "prompts": prompts(one),
        "new_tokens": NEW_TOKENS,
        "context": 16 + NEW_TOKENS,
        "rounds": ROUNDS,
    }
    times: dict[str, list[float]] = run_worker(engine, SPEED_WORKER, job, {}, LIMIT_S)[0]["times"]
    return times


def prompts(one: LoadedModel) -> list[list[int]]:
    """Token ids of the first fixed texts, the same for every engine."""
    return [ids[:16] for ids in reference_tokens(one)[:PROMPTS]]


def our_speeds(one: LoadedModel, made: Mapping[str, Path]) -> dict[str, list[float]]:
    """The same in transformers, and under hooks."""
    models = {
        "base": one,
        AGAIN: load(one.source, device="cpu"),
        **{name: reload(made[name], one) for name in (BIASED, ADAPTED)},
    }
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

    def write(model: LoadedModel, program: Program | None = None) -> None:
        for ids in prompts(one):
            tokens = torch.tensor([ids])
            with torch.no_grad(), neutral_generation(model), steered(model.model, program):
                model.model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **settings)

    works: dict[str, Callable[[], None]] = {name: partial(write, model) for name, model in models.items()}
    works["base under hooks"] = partial(write, one, Program.load(PROGRAM))
    return speed_worker.speeds(works, PROMPTS * NEW_TOKENS, ROUNDS)


def reading_rows(found: Sequence[tuple[str, EngineRecord]]) -> list[str]:
    """Markdown: a row for each reading, with the format of its files."""
    rows = (
        f"{one.engine}, {precision} | {one.form} | " + " | " * 6 + "refused"
        if one.problem
        else f"{one.engine}, {precision} | {one.form} | {one.error:.1e} | {one.rms:.1e} | {one.base_error:.1e} | {one.base_rms:.1e} | "
        f"{one.effect:.2f} | {one.gain:.4f} | {'same' if one.passed else 'OTHER'}"
        for precision, one in found
    )
    lines = table("engine, format | form | largest | rms | base: largest | rms | steering's effect | gain | ", rows)
    problems = {
        f"- {one.engine}, {one.form}: {one.problem.replace(f'{ROOT}/', '')}" for _precision, one in found if one.problem
    }
    return [*lines, "", *sorted(problems)]


def speed_rows(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Markdown: a row an engine and form, its median and what it is of the base's, round by round."""
    rows = []
    for engine, times in found.items():
        for name, values in times.items():
            over = ""
            if name != "base":
                ratios = np.array(values) / np.array(times["base"])
                low, high = bootstrap((ratios,), np.median, method="percentile", rng=0).confidence_interval
                over = f"{np.median(ratios):.3f} [{low:.3f}, {high:.3f}]"
            rows.append((engine, name, f"{np.median(values):.1f}", over))
    return table(" | form | tokens a second | over base", rows)


def missing(engines: Sequence[Environment], found: list[Finding]) -> Iterator[Finding]:
    """What was not found before: first what is computed, then how fast."""
    known = {(one.engine, one.precision) for one in found}
    model = load("smollm2-135m-instruct", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        made = forms(Path(folder), model)
        for engine in engines:
            for precision in GGUF_KINDS if engine.name != "vllm" else ["f32"]:
                if (engine.name, precision) not in known:
                    some = made if precision == "f32" else {BIASED: made[BIASED]}
                    with tempfile.TemporaryDirectory() as scratch:
                        tokens = reference_tokens(model)
                        rows = measure_forms(engine, some, model, precision, tokens, Path(scratch), LIMIT_S)
                    yield from (Finding(engine.name, precision, reading) for reading in rows)
        for place in (None, *engines):
            name = "transformers" if place is None else place.name
            if (name, SPEED) not in known:
                busy = os.getloadavg()[0]
                with tempfile.TemporaryDirectory() as scratch:
                    times = our_speeds(model, made) if place is None else speeds(place, model, made, Path(scratch))
                yield Finding(name, SPEED, times=times, load_average=busy)


def report(found: Sequence[Finding]) -> list[str]:
    """The page below its heading."""
    readings_ = [(one.precision, one.reading) for one in found if one.reading is not None]
    speeds_ = [one for one in found if one.precision == SPEED]
    lines = [
        prose("engines: introduction"),
        "",
        *reading_rows(readings_),
        "",
        prose("engines: families"),
        "",
        "## Throughput",
        "",
    ]
    if not speeds_:
        return [*lines, "Not measured yet: `make verify-engines` goes on where it was stopped."]
    rounds = ", ".join(map(str, sorted({len(values) for one in speeds_ for values in one.times.values()})))
    busy = max(one.load_average for one in speeds_)
    setting = prose("engines: throughput", prompts=PROMPTS, new_tokens=NEW_TOKENS, rounds=rounds, busy=busy)
    return [*lines, setting, "", *speed_rows({one.engine: one.times for one in speeds_})]


def main() -> int:
    """Compare and time what is missing, and write the page; exit code 1 where an engine computes something else."""
    try:
        engines = [environment(name) for name in ENGINES]
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    setting = (
        f"{'; '.join(map(str, engines))}. SmolLM2-135M-Instruct, the ocean program of this repository, "
        f"{len(REFERENCE_TEXTS)} fixed texts."
    )
    record = replace(RECORD, setting=setting)
    record.resume(
        partial(missing, engines), report, lambda one: f"{one.engine}, {one.precision}: {one.reading or one.times}"
    )
    return 0 if all(one.reading.passed or one.reading.problem for one in record.findings() if one.reading) else 1


RECORD = Record("ENGINES", "What serving engines compute of our files", "python -m benchmarks.engines", kind=Finding)


if __name__ == "__main__":
    sys.exit(main())
