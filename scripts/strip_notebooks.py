"""Remove from notebooks what running adds: outputs, execution counts and editor metadata.

python scripts/strip_notebooks.py            all of notebooks/, or the given files
python scripts/strip_notebooks.py --check    only check; exit code 1: a notebook has outputs

"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},  # tells tools that the code is Python
}


def strip_outputs(file: Path) -> str:
    """Return a notebook's text without outputs and metadata."""
    notebook = nbformat.read(file, as_version=4)
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(notebook) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", default=sorted(NOTEBOOKS.glob("*.ipynb")))
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    full = [file for file in options.files if file.read_text(encoding="utf-8") != strip_outputs(file)]
    for file in full:
        print(f"{file.name}: it has outputs in it; make format takes them out" if options.check else file.name)
        if not options.check:
            file.write_text(strip_outputs(file), encoding="utf-8")
    return int(options.check and bool(full))


if __name__ == "__main__":
    sys.exit(main())
