"""Tokens a second in a serving engine; run by its environment's interpreter as `speed_worker.py FOLDER`.

job.json: `worker` (the path of the package's own worker for this engine, which opens the models) and its `models`;
`prompts`, lists of token ids; `new_tokens` of each answer; `rounds`, each in an order of its own. out.json: `times`,
tokens a second by model, a value a round.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: Path) -> None:
    """Time every model in every round, and leave the answer in `folder`."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    path = Path(job["worker"])
    sys.path.append(str(path.parent))
    writers = (vllm_writers if path.stem == "vllm_worker" else llama_cpp_writers)(path.stem, job)
    times = speeds(writers, len(job["prompts"]) * job["new_tokens"], job["rounds"])
    np.savez(folder / "out.npz", allow_pickle=False)
    (folder / "out.json").write_text(json.dumps({"times": times}), encoding="utf-8")


def speeds(writers: dict[str, Callable[[], None]], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Tokens a second by model, a value a round; each writes so many `tokens` in a round."""
    times: dict[str, list[float]] = {name: [] for name in writers}
    for round_ in range(rounds + 1):
        for name in random.Random(round_).sample(list(writers), len(writers)):
            started = time.perf_counter()
            writers[name]()
            if round_:  # the first warms up
                times[name].append(tokens / (time.perf_counter() - started))
    return times


def llama_cpp_writers(module: str, job: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """By model, the work of a round in llama.cpp."""
    worker = importlib.import_module(module)

    def write(engine: Any) -> None:
        for ids in job["prompts"]:
            engine.reset()
            engine.eval(ids)
            for _token in range(job["new_tokens"]):
                engine.eval([int(engine.scores[engine.n_tokens - 1].argmax())])

    return {model["name"]: partial(write, worker.load_model(model, job["context"])) for model in job["models"]}


def vllm_writers(module: str, job: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """By model, the work of a round in vLLM."""
    worker = importlib.import_module(module)
    engines = worker.load_engines({model["name"]: model for model in job["models"]}, job["context"])
    settings = {"max_tokens": job["new_tokens"], "temperature": 0.0, "ignore_eos": True, "detokenize": False}
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]

    def write(model: dict[str, Any]) -> None:
        sampling, lora = worker.SamplingParams(**settings), worker.lora_request(model)
        engines[worker.key(model)].generate(prompts, sampling, lora_request=lora, use_tqdm=False)

    return {model["name"]: partial(write, model) for model in job["models"]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
