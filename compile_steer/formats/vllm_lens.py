"""The JSON of vllm-lens, a plugin of vLLM: vectors that a request carries, added to the output of blocks at every token.

Written after vllm-lens 1.3.0: a list of its `SteeringVector`, whose tensor is base64 of little-endian fp32.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from compile_steer.artifacts.files import save_json


def write(path: Path, vectors: Mapping[int, Tensor]) -> None:
    """Write `vectors`, block -> [d_model], bit by bit as they are in fp32."""
    layers = sorted(vectors)
    rows = torch.stack([vectors[layer].detach().float().cpu() for layer in layers]).numpy().astype("<f4")
    activations = {
        "data": base64.b64encode(rows.tobytes()).decode("ascii"),
        "dtype": "float32",
        "original_dtype": "torch.float32",
        "shape": list(rows.shape),
    }
    one = {"activations": activations, "layer_indices": layers, "scale": 1.0, "norm_match": False}
    save_json(path, [{**one, "position_indices": None}])
