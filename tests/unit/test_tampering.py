"""Every tampering of the table is noticed by the command that uses the file, in words."""

from __future__ import annotations

import pytest

from benchmarks.tampering import TAMPERINGS, Tampering, unnoticed
from tests.helpers.small_run import SmallRun


@pytest.mark.parametrize("tampering", TAMPERINGS, ids=str)
def test_tampering_is_noticed(run: SmallRun, tampering: Tampering) -> None:
    assert unnoticed(tampering, run.root) == ""


def test_the_table_is_large_and_names_each_tampering_once() -> None:
    assert len({str(one) for one in TAMPERINGS}) == len(TAMPERINGS) >= 60
