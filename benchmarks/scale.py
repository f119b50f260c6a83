"""What issues of size cost: a large merge, more processes than one, a fleet; one table in one go.

    python -m benchmarks.scale FOLDER [--only processes,closed_form,memory,fleet,merge] [--gigabytes 20]

FOLDER needs room for twice the checkpoint, which is deleted again. Every row is measured in a process of its own, with one
thread; other work on the machine falsifies the times.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import planned_memory
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


def measure_processes(folder: Path, recipe: Path, changes: Sequence[str]) -> list[Row]:
    """A whole run in one process and in two, one thread each."""
    seconds: list[float] = []
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    for count in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
        words = [
            sys.executable,
            *launcher,
            "-m",
            "compile_steer",
            "run",
            str(recipe),
            "--out",
            str(folder / str(count)),
        ]
        words += ["--force", *(f"--set={change}" for change in changes)]
        started = time.perf_counter()
        done = subprocess.run(words, check=False, env=settings, capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
        if done.returncode not in (0, 1):
            raise SystemExit(f"{count} processes: {done.stderr[-2000:]}")
    shutil.rmtree(folder)
    one, two = seconds
    return [
        (
            f"{recipe.stem}, a whole run: 1 process over 2",
            "at least 1.6 x",
            f"{one / two:.2f} x ({one:.0f} s, {two:.0f} s)",
        )
    ]


def measure_fleet(folder: Path, recipe: Path, changes: Sequence[str], count: int = 6) -> list[Row]:
    """So many copies of a recipe, with another seed each, by one worker and by two."""
    from compile_steer.recipe import rewritten
    from compile_steer.tools.fleet import run_fleet

    os.environ["OMP_NUM_THREADS"] = "1"
    paths = [recipe.with_name(f"{recipe.stem}-{n}.fleet.yaml") for n in range(count)]
    try:
        for n, path in enumerate(paths):
            path.write_text(rewritten(recipe, [*changes, f"name={recipe.stem}-{n}", f"seed={n}"]), encoding="utf-8")
        fleets = [run_fleet(paths, folder / str(workers), workers=workers, force=True) for workers in (1, 2)]
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    one, two = (fleet.seconds for fleet in fleets)
    states = ", ".join(sorted({row.state for fleet in fleets for row in fleet.rows}))
    return [
        (
            f"fleet of {count} on 2 workers over 1",
            "at least 1.7 x",
            f"{one / two:.2f} x ({one:.0f} s, {two:.0f} s; {states})",
        )
    ]


def measure_closed_form(folder: Path, shape: str) -> list[Row]:
    """The closed form over one forward pass of its tokens, on random texts (see `benchmarks.gpu`)."""
    import torch

    from benchmarks.gpu import SHAPES, measure

    folder.mkdir(parents=True)
    _profile, _phases, remarks = measure(
        SHAPES[shape], folder, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    shutil.rmtree(folder)
    return [(f"shape {shape}", "at most 1.5 x and 2 x", remark) for remark in remarks[:2]]


def main() -> None:
    """Measure the rows that are asked for, and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="processes,closed_form,memory,fleet,merge")
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/ocean.yaml"), help="of processes and fleet")
    parser.add_argument("--set", action="append", default=[], help="change of that recipe, KEY=VALUE")
    parser.add_argument("--tiny", action="store_true", help="of tiny widths, as the tests run it")
    options = parser.parse_args()
    parts: dict[str, Callable[[], list[Row]]] = {
        "merge": lambda: measure_merge(options.folder / "merge", options.gigabytes, not options.tiny),
        "memory": lambda: planned_memory.measure_memory(
            options.folder / "memory", list(planned_memory.MEMORY_SHAPES), 1000
        ),
        "processes": lambda: measure_processes(options.folder / "processes", options.recipe, options.set),
        "fleet": lambda: measure_fleet(options.folder / "fleet", options.recipe, options.set),
        "closed_form": lambda: measure_closed_form(options.folder / "shape", "tiny" if options.tiny else "135m"),
    }
    print("| measured | goal | here |\n|---|---|---|")
    for name in options.only.split(","):
        for row in parts[name]():
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
