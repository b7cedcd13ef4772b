"""Write JSON Schemas of conf/, with which editors complete and check its files (see docs/terminal.md).

    python scripts/schema.py               into .schema/
    python scripts/schema.py --to FOLDER   elsewhere

Run it again after adding or changing a class; until then, editors accept anything for it.

"""

from __future__ import annotations

import argparse
from pathlib import Path

from ablab.lab.config.errors import readable_errors
from ablab.lab.config.json_schema import write_schemas
from ablab.lab.config.yaml_files import CONF
from ablab.lab.run.folder import relpath


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--to", type=Path, default=CONF.parent / ".schema", help="the folder to write to (default: .schema)"
    )
    folder = parser.parse_args().to
    written = write_schemas(CONF, folder)
    print(f"{len(written)} schemas in {relpath(folder)}, for .vscode/settings.json")


if __name__ == "__main__":
    with readable_errors():
        main()
