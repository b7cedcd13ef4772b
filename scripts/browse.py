"""Write one page of all runs and ablations in a folder, and open it; it needs no server and no account.

    python scripts/browse.py
    python scripts/browse.py runs/norm_batch_size      the runs of one ablation
    python scripts/browse.py --no-open                 write runs/index.html without opening a browser

The page is a snapshot: run the command again to update it. Exit code 2: there is no run.

"""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from pathlib import Path

from ablab.lab.browse.collect import collect
from ablab.lab.browse.page import write
from ablab.lab.config.errors import readable_errors
from ablab.lab.run.folder import relpath


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="the folder of runs (default: runs)")
    parser.add_argument("--no-open", action="store_true", help="do not open the page in the browser")
    options = parser.parse_args()
    content = collect(options.folder)
    file = write(content, options.folder)
    runs, ablations = len(content["runs"]), len(content["ablations"])
    print(f"{relpath(file.absolute())}: {runs} runs, {ablations} ablations, {file.stat().st_size / 1e6:.1f} MB")
    if not options.no_open and has_display():
        webbrowser.open(file.absolute().as_uri())


def has_display() -> bool:
    """Return whether a window can be opened; otherwise webbrowser would start a text browser in the terminal."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


if __name__ == "__main__":
    with readable_errors():
        main()
