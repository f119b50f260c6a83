"""What issues of size cost: a large merge, more processes than one, a fleet; one table in one go.

    python -m benchmarks.scale FOLDER [--only merge,...] [--gigabytes 20]

FOLDER needs room for twice the checkpoint, which is deleted again. Every row is measured in a process of its own, with one
thread; other work on the machine falsifies the times.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compile_steer.common.profile import own_memory

Row = tuple[str, str, str]  # what was measured, the goal, the figure


def peak_memory(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of `work` in a forked process, and the most memory of its own that it takes meanwhile, in GiB.

    Of its own: pages of files that it reads, which the kernel drops when it needs room, are not counted.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def measured() -> None:
        most, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                most[0] = max(most[0], own_memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
        send.send((seconds, most[0] / 2**30))

    process = context.Process(target=measured)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the measured process ended with exit code {process.exitcode}")
    result: tuple[float, float] = receive.recv()
    return result


def random_checkpoint(folder: Path, gigabytes: float, wide: bool = True) -> int:
    """Write a llama of about so many GB in bfloat16, of the widths of 8B if `wide`; returns its number of blocks."""
    import torch
    from safetensors.torch import save_file

    d, inner, vocabulary = (4096, 14336, 128256) if wide else (64, 160, 512)
    kv, seed = d // 4, torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (inner, d),
        "mlp.up_proj": (inner, d),
        "mlp.down_proj": (d, inner),
    }
    block = 2 * sum(a * b for a, b in shapes.values())
    n_blocks = max(2, round((gigabytes * 1e9 - 4 * vocabulary * d) / block))
    # One random block is enough: what is in the others does not change what they cost.
    one = {name: (torch.randn(shape, generator=seed) / shape[1] ** 0.5).bfloat16() for name, shape in shapes.items()}
    norm = torch.ones(d, dtype=torch.bfloat16)
    table = (torch.randn(vocabulary, d, generator=seed) / d**0.5).bfloat16()
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    ends = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone(), "model.norm.weight": norm}
    save("model-00000.safetensors", ends)
    for k in range(n_blocks):
        named = {f"model.layers.{k}.{name}.weight": weight for name, weight in one.items()}
        norms = {f"model.layers.{k}.{n}_layernorm.weight": norm.clone() for n in ("input", "post_attention")}
        save(f"model-{k + 1:05d}.safetensors", {**named, **norms})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": d,
        "intermediate_size": inner,
        "num_hidden_layers": n_blocks,
        "num_attention_heads": 32 if wide else 4,
        "num_key_value_heads": 8 if wide else 1,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return n_blocks


def flush() -> None:
    """Wait until all that was written is on the disk, so that nobody pays for what another has written."""
    os.sync()


def measure_merge(folder: Path, gigabytes: float, wide: bool = True) -> list[Row]:
    """Merge a patch of every output projection into a random checkpoint, and copy its files, each written to the disk."""
    import torch

    from compile_steer.export.merged import MergedCheckpoint
    from compile_steer.steering.low_rank import LowRank
    from compile_steer.steering.patch import WeightPatch

    base, merged, copied = folder / "base", folder / "merged", folder / "copied"
    n_blocks = random_checkpoint(base, gigabytes, wide)
    size = sum(file.stat().st_size for file in base.iterdir()) / 1e9
    shapes = (
        {"self_attn.o_proj": (4096, 4096), "mlp.down_proj": (4096, 14336)} if wide else {"mlp.down_proj": (64, 160)}
    )
    edits = {
        f"model.layers.{k}.{name}": LowRank(torch.randn(d_out, 8) / 100, torch.randn(8, d_in) / 100)
        for k in range(n_blocks // 2, n_blocks)
        for name, (d_out, d_in) in shapes.items()
    }

    def merge() -> None:
        merged.mkdir()
        MergedCheckpoint(base, WeightPatch(edits)).write_weights(merged, torch.bfloat16)
        flush()

    def copy() -> None:
        shutil.copytree(base, copied)
        flush()

    try:
        flush()
        copy_seconds, _copy_memory = peak_memory(copy)
        shutil.rmtree(copied)
        seconds, memory = peak_memory(merge)
    finally:
        shutil.rmtree(folder)
    what = f"merge of {size:.1f} GB ({len(edits)} of its matrices edited)"
    return [
        (f"{what}: peak memory", "at most 2 GiB", f"{memory:.2f} GiB"),
        (
            f"{what}: over a file copy",
            "at most 2 x",
            f"{seconds / copy_seconds:.2f} x ({seconds:.0f} s, {copy_seconds:.0f} s)",
        ),
    ]


MEMORY_SHAPES = {  # width, MLP, blocks, heads, key-value heads, vocabulary
    "wide": (1024, 2816, 6, 16, 4, 8000),
    "deep": (320, 860, 40, 5, 5, 8000),
    "large vocabulary": (256, 688, 8, 4, 4, 128_000),
    "large MLP": (384, 3072, 10, 6, 2, 16_000),
    "SmolLM2's": (576, 1536, 30, 9, 3, 49_152),
}


def measure_memory(folder: Path, shapes: Sequence[str], tokens: int) -> list[Row]:
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


def main() -> None:
    """Measure the rows that are asked for, and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="merge")
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--tiny", action="store_true", help="of tiny widths, as the tests run it")
    options = parser.parse_args()
    parts: dict[str, Callable[[], list[Row]]] = {
        "merge": lambda: measure_merge(options.folder / "merge", options.gigabytes, not options.tiny),
        "memory": lambda: measure_memory(options.folder, list(MEMORY_SHAPES), 1000),
    }
    print("| measured | goal | here |\n|---|---|---|")
    for name in options.only.split(","):
        for row in parts[name]():
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
