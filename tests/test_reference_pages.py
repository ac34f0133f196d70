"""What `import pyprune` offers stands in the reference; `make docs` checks that what stands there exists."""

from __future__ import annotations

from pathlib import Path

import pyprune


def test_every_public_name_has_an_entry() -> None:
    pages = Path(__file__).parent.parent / "docs/api"
    entries = {line for page in pages.glob("*.md") for line in page.read_text().splitlines() if line.startswith("::: ")}
    missing = [name for name, module in pyprune._EXPORTS.items() if f"::: pyprune.{module}.{name}" not in entries]
    assert not missing
