"""docs/claims.md: the claims that the project was started to measure, and the ablations that settle them."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CLAIMS = (ROOT / "docs" / "claims.md").read_text()


def test_every_claim_has_a_verdict_and_a_section() -> None:
    wanted = [f"{kind}{number}" for kind, last in (("M", 5), ("S", 5), ("N", 7)) for number in range(1, last + 1)]
    assert re.findall(r"^\| ([MSN]\d) \|", CLAIMS, re.MULTILINE) == wanted
    assert set(re.findall(r"^\*\*([MSN]\d)", CLAIMS, re.MULTILINE)) | {"N7"} == set(wanted)


def test_every_ablation_on_the_page_settles_one() -> None:
    files = (ROOT / "conf" / "ablation").glob("*.yaml")
    contents = {path.stem: yaml.safe_load(path.read_text()) or {} for path in files}
    settling = {name for name, content in contents.items() if content.get("ablation", {}).get("claims")}
    shown = set(re.findall(r"`python train.py ablation=(\w+)`", CLAIMS))
    assert shown == settling
    assert len(shown) > 10
