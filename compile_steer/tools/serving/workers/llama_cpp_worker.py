"""Log-probabilities in llama.cpp; run by its environment's interpreter as `llama_cpp_worker.py FOLDER`.

job.json: `models`, each a `name`, a GGUF `file`, and beside it `adapter` (a LoRA file) or `control_vector`; `context`, the most
tokens. in.npz: `ids`, all sequences behind one another, and their `lengths`. out.npz: by name, log p of every token but each
sequence's first, in nats. out.json: the `version`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

_F32 = 0  # ggml's number of the type; keys and values are F16 by default, whose rounding would hide what is measured


def main(folder: Path) -> None:
    """Read the job in `folder`, and leave the answer there."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    arrays = np.load(folder / "in.npz")
    sequences = [part.tolist() for part in np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])]
    logprobs = {}
    for model in job["models"]:
        engine = load_model(model, job["context"])
        logprobs[model["name"]] = np.concatenate([token_logprobs(engine, ids) for ids in sequences])
        engine.close()  # one model in memory at a time
    np.savez(folder / "out.npz", allow_pickle=False, **logprobs)
    (folder / "out.json").write_text(json.dumps({"version": llama_cpp.__version__}), encoding="utf-8")


def load_model(model: dict[str, Any], context: int) -> Any:
    """The model with its adapter or control vector, keys and values in fp32."""
    engine = llama_cpp.Llama(
        model["file"],
        lora_path=model.get("adapter"),
        n_ctx=context,
        n_batch=context,
        n_threads=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        logits_all=True,  # by default only the last token's are kept
        type_k=_F32,
        type_v=_F32,
        verbose=False,
    )
    if "control_vector" in model:
        steer(engine, Path(model["control_vector"]))
    return engine


def steer(engine: Any, path: Path) -> None:
    """Add a control vector's file, as llama.cpp's own programs do by --control-vector.

    That code is not part of the library. It refuses direction.0, sums tensors of the same block, and passes one
    buffer [n_layers - 1, d_model], whose first row is for block 1.
    """
    width, blocks = engine.n_embd(), llama_cpp.llama_model_n_layer(engine.model)
    rows = np.zeros((blocks - 1, width), dtype=np.float32)
    for tensor in gguf.GGUFReader(path).tensors:
        layer = int(tensor.name.removeprefix("direction."))
        if layer < 1 or tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            raise SystemExit(f"{tensor.name} of {path}: llama.cpp takes F32 directions from 1 on")
        rows[layer - 1] += np.asarray(tensor.data)
    data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if llama_cpp.llama_set_adapter_cvec(engine.ctx, data, rows.size, width, 1, blocks):
        raise SystemExit(f"llama.cpp does not take {path}")


def token_logprobs(engine: Any, ids: list[int]) -> np.ndarray:
    """log p of every token but the first, [n], in nats."""
    engine.reset()
    engine.eval(ids)
    logits = engine.scores[: len(ids) - 1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)  # or exp overflows
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    logprobs: np.ndarray = chosen - np.log(np.exp(logits).sum(axis=1))
    return logprobs


if __name__ == "__main__":
    main(Path(sys.argv[1]))
