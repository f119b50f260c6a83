"""What recipes and reports import must not load heavy libraries, so that every command starts at once."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"torch", "transformers", "peft", "scipy", "sklearn", "matplotlib", "gguf", "huggingface_hub", "openai"}
MODULES = (
    "stats",
    "models.text",
    "formats.foreign",
    "extraction.options",
    "scoring.options",
    "validation.options",
    "validation.report",
    "verification.options",
    "verification.parity",
    "report.card",
    "report.page",
    "report.terminal",
)


def test_options_and_reports_import_no_heavy_library() -> None:
    imports = "; ".join(f"import compile_steer.{module}" for module in MODULES)
    code = f"{imports}; import sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == ""
