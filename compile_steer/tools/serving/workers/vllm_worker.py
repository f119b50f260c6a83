"""Log-probabilities in vLLM; run by its environment's interpreter as `vllm_worker.py FOLDER`.

job.json: `models`, each a `name`, a model's `folder`, and for an adapter on it `adapter` (its folder) and `rank`, for a program
`steering` (its file for the plugin vllm-lens); `context`, the most tokens. in.npz: `ids`, all sequences behind one another,
and their `lengths`. out.npz: by name, log p of every token but each sequence's first, in nats. out.json: the `version`.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: less to lose

import vllm
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(folder: Path) -> None:
    """Read the job in `folder`, and leave the answer there."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    # A plugin changes every model, so it is loaded only where a program needs it.
    os.environ["VLLM_PLUGINS"] = "activations" if any("steering" in model for model in job["models"]) else ""
    arrays = np.load(folder / "in.npz")
    sequences = [part.tolist() for part in np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])]
    models = {model["name"]: model for model in job["models"]}
    engines = load_engines(models, job["context"])
    logprobs = {name: token_logprobs(engines[key(model)], model, sequences) for name, model in models.items()}
    np.savez(folder / "out.npz", allow_pickle=False, **logprobs)
    (folder / "out.json").write_text(json.dumps({"version": vllm.__version__}), encoding="utf-8")


def key(model: dict[str, Any]) -> tuple[str, bool]:
    """Models that share an engine: those of one folder, with and without adapters apart, as the engine is slower with them."""
    return model["folder"], "adapter" in model


def load_engines(models: dict[str, dict[str, Any]], context: int) -> dict[tuple[str, bool], LLM]:
    """An engine for every folder, in fp32."""
    ranks: dict[tuple[str, bool], int] = {}
    for model in models.values():
        ranks[key(model)] = max(ranks.get(key(model), 0), model.get("rank", 0))
    return {
        (folder, adapted): LLM(
            model=folder,
            dtype="float32",
            enforce_eager=True,
            max_model_len=context,
            seed=0,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            enable_lora=adapted,
            **({"max_lora_rank": rank} if adapted else {}),
        )
        for (folder, adapted), rank in ranks.items()
    }


def lora_request(model: dict[str, Any]) -> LoRARequest | None:
    """The adapter of a request; its number must be its own within the engine."""
    return (
        LoRARequest(model["name"], 1 + zlib.crc32(model["adapter"].encode()) % 10_000, model["adapter"])
        if "adapter" in model
        else None
    )


def token_logprobs(engine: LLM, model: dict[str, Any], sequences: list[list[int]]) -> np.ndarray:
    """log p of every token but the first of each sequence, [n], in nats."""
    steering = Path(model["steering"]).read_text(encoding="utf-8") if "steering" in model else None
    values: list[float] = []
    for ids in sequences:  # one at a time: in a batch vLLM applies the adapter's part of the logits to the wrong rows
        extra = {"extra_args": {"apply_steering_vectors": steering}} if steering else {}  # anew: the plugin empties it
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, **extra)
        (answer,) = engine.generate(
            [{"prompt_token_ids": ids}], sampling, lora_request=lora_request(model), use_tqdm=False
        )
        values += [place[token].logprob for token, place in zip(ids[1:], answer.prompt_logprobs[1:], strict=True)]
    return np.array(values, dtype=np.float64)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
