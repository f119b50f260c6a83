"""What a table was measured on, and when."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path

import torch


def machine() -> str:
    """One sentence: date, processor, cores, torch, precision."""
    return f"{date.today().isoformat()}, {_processor()}, {os.cpu_count()} cores, torch {torch.__version__}, fp32, one seed."


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
