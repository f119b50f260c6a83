"""Planned memory against measured peaks, for five shapes; a part of `benchmarks.scale`."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEMORY_SHAPES = {  # width, MLP, blocks, heads, key-value heads, vocabulary
    "wide": (1024, 2816, 6, 16, 4, 8000),
    "deep": (320, 860, 40, 5, 5, 8000),
    "large vocabulary": (256, 688, 8, 4, 4, 128_000),
    "large MLP": (384, 3072, 10, 6, 2, 16_000),
    "SmolLM2's": (576, 1536, 30, 9, 3, 49_152),
}


def measure_memory(folder: Path, shapes: Sequence[str], tokens: int) -> list[tuple[str, str, str]]:
    """Planned memory against the measured peak of extraction, generation and closed form, for models in float32."""
    import torch

    from benchmarks.gpu import Shape, random_model, random_texts
    from compile_steer.common.profile import PeakMemory
    from compile_steer.lowering import closed_form
    from compile_steer.lowering.job import Lowering
    from compile_steer.models.forward import capture
    from compile_steer.models.generate import continue_prompts
    from compile_steer.models.tokens import batches
    from compile_steer.pipeline.memory import LIBRARIES, ModelSize
    from compile_steer.steering.passes import canonical
    from compile_steer.steering.program import Intervention, Program
    from compile_steer.steering.sites import Site

    def run(name: str, send: Any) -> None:
        torch.set_num_threads(1)
        shape = Shape(*MEMORY_SHAPES[name], pairs=0, calibration=tokens, steps=0)
        loaded = random_model(shape, folder / name, torch.device("cpu"), torch.float32)
        size, memory, found = ModelSize.of(folder / name, torch.float32), PeakMemory(), {}
        shutil.rmtree(folder / name)
        texts, n_blocks = random_texts(shape, tokens), loaded.layout.n_layers
        vector = torch.randn(shape.d_model)
        steering = Intervention(Site(n_blocks - 3, "resid_post"), "add", vector, 1.0, "all")
        program = canonical(Program((steering,), loaded.id, loaded.revision))

        def extract() -> None:
            for batch in batches(loaded, texts):
                capture(loaded.layout, batch, "resid_post")

        def generate() -> None:
            prompts = [text for text in random_texts(shape, 32 * 100)]
            continue_prompts(loaded, prompts, program, max_new_tokens=2, temperature=1.0)

        def fit() -> None:
            lowering = Lowering(program, loaded, ())
            lowering.__dict__.update(regression_texts=texts)
            closed_form.lower(lowering, [closed_form.Stage(n_blocks - 3, "mlp", 4)])

        planned = {"extraction": size.extraction(tokens), "generation": size.generation(32, 22)}
        planned["closed form"] = size.closed_form(tokens)
        for stage, work in zip(planned, (extract, generate, fit), strict=True):
            memory.restart()
            work()
            found[stage] = memory.restart(), LIBRARIES + size.weights + planned[stage]
        send.send(found)

    rows, context = [], multiprocessing.get_context("fork")
    for name in shapes:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=run, args=(name, send))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"memory of the shape {name}: exit code {process.exitcode}")
        for stage, (measured, planned) in receive.recv().items():
            figures = (
                f"{planned / measured:.2f} x ({planned / 2**20:,.0f} MiB planned, {measured / 2**20:,.0f} measured)"
            )
            rows.append((f"planned over measured memory, {name}: {stage}", "0.85 to 1.15", figures))
    return rows
