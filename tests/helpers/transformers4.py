"""Load model folders with transformers 4, in a process of its own: what is written must mean the same to older readers.

Run as a file, this one imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LIBRARIES = Path(__file__).parents[2] / ".engines" / "transformers-4"
ABSENT = f"{LIBRARIES} is not there: 'make test' installs it"


def read_by_transformers4(folders: list[Path], ids: list[int], texts: list[str]) -> list[dict[str, Any]]:
    """For each folder the version, the logits [time, vocabulary] of `ids` and the token ids of each text."""
    environment = {**os.environ, "PYTHONPATH": str(LIBRARIES)}
    request = json.dumps({"folders": [str(folder) for folder in folders], "ids": ids, "texts": texts})
    command = [sys.executable, "-P", __file__]
    done = subprocess.run(command, input=request, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def main() -> None:
    """Answer the request on standard input."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    request = json.load(sys.stdin)
    answers = []
    for folder in request["folders"]:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            logits = model.eval()(torch.tensor([request["ids"]])).logits[0]
        answers.append(
            {
                "version": transformers.__version__,
                "problems": [
                    *loading["missing_keys"],
                    *loading["unexpected_keys"],
                    *map(str, loading["mismatched_keys"]),
                ],
                "logits": logits.tolist(),
                "tokens": [tokenizer(text)["input_ids"] for text in request["texts"]],
            }
        )
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
