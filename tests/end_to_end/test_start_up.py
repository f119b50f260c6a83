"""Help and `show` of an adapter answer at once: they import none of the libraries that take seconds to load."""

from __future__ import annotations

import json
import subprocess
import sys

from compile_steer.cli.app import app
from tests.end_to_end.conftest import ROOT

HEAVY = {
    "datasets", "gguf", "huggingface_hub", "jinja2", "matplotlib", "peft", "scipy", "sklearn", "torch",
    "transformers",
}  # fmt: skip
COMMANDS = [str(command.name) for command in app.registered_commands]
# Runs the command line once for each list of arguments; prints what it imported, last.
PROGRAM = """
import json, sys
from compile_steer.__main__ import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["compile-steer", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert stop.code in (None, 0, 1), arguments  # 1: shown, and something is not as it was
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def imported(*commands: list[str]) -> set[str]:
    """Names of the top-level modules that a process has imported after these commands."""
    arguments = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_imports_no_heavy_library() -> None:
    assert len(COMMANDS) > 15
    assert imported(["--help"], *([name, "--help"] for name in COMMANDS)) & HEAVY == set()


def test_show_of_an_adapter_imports_no_torch() -> None:
    assert imported(["show", "adapters/ocean-closed_form"]) & (HEAVY - {"jinja2"}) == set()
