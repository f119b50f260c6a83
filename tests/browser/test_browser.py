"""The browser itself: what the other tests rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_a_page_on_disk_is_opened_and_its_script_runs(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("<p id=a></p><script>document.getElementById('a').textContent = 6 * 7</script>", encoding="utf-8")
    page.goto(file.as_uri())
    assert page.text_content("#a") == "42"
