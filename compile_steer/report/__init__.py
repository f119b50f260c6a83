"""Report: what a run found, in a terminal and as one self-contained page."""

from compile_steer.report.artifact import print_audit, print_chain, print_reproduction, print_upload
from compile_steer.report.engines import print_readings, print_shipped
from compile_steer.report.page import write_page
from compile_steer.report.terminal import (
    print_composition,
    print_decompiled,
    print_parities,
    print_plan,
    print_recombined,
    print_samples,
    print_validation,
    print_writing,
)

__all__ = [
    "print_audit",
    "print_chain",
    "print_composition",
    "print_decompiled",
    "print_parities",
    "print_plan",
    "print_readings",
    "print_recombined",
    "print_reproduction",
    "print_samples",
    "print_shipped",
    "print_upload",
    "print_validation",
    "print_writing",
    "write_page",
]
