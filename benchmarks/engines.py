"""What serving engines compute of the files that are written for them: the ocean program, compiled and not.

    python -m benchmarks.engines

Needs what `make engines` installs; without it, it says what is missing and writes nothing. Takes about ten minutes.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from benchmarks.ocean import ROOT, machine
from compile_steer.engines.compare import Reading, ask, jobs, readings, texts, written_base
from compile_steer.engines.environment import ENGINES, Environment, environment
from compile_steer.engines.reads import EngineName
from compile_steer.engines.ship import ship
from compile_steer.errors import EngineError
from compile_steer.export import GGUF_KINDS, read_patch, write_merged
from compile_steer.files import save_text
from compile_steer.hooks import steered
from compile_steer.lower.bias import shifts
from compile_steer.models import Loaded, load
from compile_steer.passes import canonical
from compile_steer.patch import WeightPatch
from compile_steer.program import Program
from compile_steer.provenance import Provenance
from compile_steer.reload import reload

PAGE = ROOT / "docs" / "ENGINES.md"
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
INTRODUCTION = """\
log p of every token of the texts, in the engine less in stock transformers (PEFT, a merged folder, or our hooks for the
program), nats: largest and root mean square. f16 and quantised files are held against transformers on the very numbers that they
hold, de-quantised: what is left is the engine's own arithmetic, which rounds activations too. Beside it the same of the base in
this engine and format; the largest change by steering; and the dose, the slope of the engine's change on transformers': 1 where
all of it is there, 0 where a file was loaded without effect. `same`: within 1e-4, or an rms within twice the base's, and the dose
within 2 %. Every file is what `compile-steer export --for` writes. llama.cpp keeps keys and values in fp32 here, not in its default
fp16; its control vector is read by us and handed to the library as its command line does it, which is not part of the library."""
ROUNDS, ROUNDS_BESIDE_OTHERS = 7, 3


def forms(folder: Path, one: Loaded) -> dict[str, Path]:
    """The ocean program in every form that lies on disk, by name."""
    program = canonical(Program.load(PROGRAM))
    origin = Provenance.read(ADAPTER).of(form="merged-fp32")
    patches: dict[str, WeightPatch] = {MERGED: read_patch(ADAPTER), BIASED: shifts(program, one.layout)}
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


def speeds(
    engine: Environment, one: Loaded, made: Mapping[str, Path], folder: Path, rounds: int
) -> dict[str, list[float]]:
    """Tokens a second of base, merged model and adapter in an engine, a value a round, in turn."""
    target: EngineName = "vllm" if engine.name == "vllm" else "llama.cpp"
    chosen = [BIASED, ADAPTED]
    shipped = [ship(made[name], target, folder / name, one.source, "f32") for name in chosen]
    models = jobs(engine, written_base(engine, one, folder / "base", "f32"), shipped, chosen)
    answer = ask(engine, models, texts(one), LIMIT_S, [["base", *chosen]], rounds)
    found: dict[str, list[float]] = answer.told["times"][0]
    return found


def our_speeds(one: Loaded, made: Mapping[str, Path], rounds: int) -> dict[str, list[float]]:
    """The same in transformers, and under hooks."""
    models = {"base": one, BIASED: reload(made[BIASED], one), ADAPTED: reload(made[ADAPTED], one)}
    program = Program.load(PROGRAM)
    prompts = [ids[:16] for ids in texts(one)[:4]]

    def write(model: Any) -> None:
        for ids in prompts:
            tokens, settings = torch.tensor([ids]), {"max_new_tokens": 48, "min_new_tokens": 48, "do_sample": False}
            with torch.no_grad():
                model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **settings)

    def hooked() -> None:
        with steered(one.model, program):
            write(one.model)

    works: dict[str, Callable[[], None]] = {name: partial(write, model.model) for name, model in models.items()}
    works["base under hooks"] = hooked
    found: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if round_:
                found[name].append(len(prompts) * 48 / (time.perf_counter() - started))
    return found


def reading_rows(found: Sequence[tuple[str, Reading]]) -> list[str]:
    """Markdown: a row a reading, with the format of its files."""
    rows = [
        "| engine, format | form | largest | rms | base: largest | rms | steering's effect | dose | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for precision, one in found:
        place = f"| {one.engine}, {precision} | {one.form} "
        if one.problem:
            rows.append(f"{place}| | | | | | | refused |")
        else:
            numbers = f"{one.error:.1e} | {one.rms:.1e} | {one.base_error:.1e} | {one.base_rms:.1e}"
            numbers += f" | {one.effect:.2f} | {one.dose:.4f}"
            rows.append(f"{place}| {numbers} | {'same' if one.passed else 'OTHER'} |")
    refused = {
        f"- {one.engine}, {one.form}: {one.problem.replace(f'{ROOT}/', '')}" for _precision, one in found if one.problem
    }
    return [*rows, "", *sorted(refused)]


def speed_rows(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Markdown: a row an engine and form, its median and what it is of the base's, round by round."""
    rows = ["| | form | tokens a second | over base [least, most] |", "|---|---|---|---|"]
    for engine, times in found.items():
        for name, values in times.items():
            ratios = sorted(value / base for value, base in zip(values, times["base"], strict=True))
            over = f"{statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]" if name != "base" else ""
            rows.append(f"| {engine} | {name} | {statistics.median(values):.1f} | {over} |")
    return rows


def main() -> int:
    """Compare, time, write the page and print it; exit code 1 where an engine computes something else."""
    try:
        engines = [environment(name) for name in ENGINES]
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    one = load("smollm2-135m-instruct", device="cpu")
    found: list[tuple[str, Reading]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made = forms(folder, one)
        for engine in engines:
            for precision in ["f32"] if engine.name == "vllm" else GGUF_KINDS:
                some = made if precision == "f32" else {BIASED: made[BIASED]}
                with tempfile.TemporaryDirectory() as scratch:
                    rows = readings(engine, some, one, precision, texts(one), Path(scratch), LIMIT_S)
                found += [(precision, row) for row in rows]
        load_average = os.getloadavg()[0]
        rounds = ROUNDS if load_average < 1.5 else ROUNDS_BESIDE_OTHERS
        times = {"transformers": our_speeds(one, made, rounds)}
        for engine in engines:
            with tempfile.TemporaryDirectory() as scratch:
                times[engine.name] = speeds(engine, one, made, Path(scratch), rounds)
    page = (
        "# What serving engines compute of our files\n\nWritten by `make verify-engines`; do not edit.\n\n"
        f"{machine()} {'; '.join(map(str, engines))}; {len(texts(one))} fixed texts, "
        f"{sum(len(ids) - 1 for ids in texts(one))} tokens. SmolLM2-135M-Instruct, the ocean program of this repository.\n\n"
        f"{INTRODUCTION}\n\n"
        + "\n".join(reading_rows(found))
        + f"\n\n## Throughput\n\nGreedy, 4 prompts x 48 tokens, fp32, {rounds} rounds in turn, medians; the machine's load average "
        f"was {load_average:.1f} on {os.cpu_count()} cores.\n\n" + "\n".join(speed_rows(times)) + "\n"
    )
    save_text(PAGE, page)
    Console(width=132).print(page, markup=False)
    return 0 if all(row.passed or row.problem for _precision, row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
