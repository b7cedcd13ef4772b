"""What a run found, to compare it with another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def result(folder: Path) -> dict[str, Any]:
    """What must be equal to the bit."""
    record = json.loads((folder / "run.json").read_text())
    files = {name: (folder / name).read_text() for name in ("metrics.csv", "samples.txt") if (folder / name).exists()}
    return {**{key: record[key] for key in ("status", "metrics", "weights_sha256")}, **files}
