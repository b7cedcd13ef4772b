"""Measure speed against a peer in the same process, and report the ratio of alternating runs.

    python scripts/benchmark.py norms            print the table
    python scripts/benchmark.py norms --write    write it to docs/benchmarks.md, and the numbers to a JSON file
    python scripts/benchmark.py data --threads 2 --root FOLDER
    python scripts/benchmark.py cifar10 --rounds 5 --root FOLDER

A ratio of 1.00 is the speed of the peer, 2.00 takes twice as long. Each is the median over rounds of the ratio within a
round, with quartiles; absolute times depend on other load of the machine, ratios much less.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import cifar10, data, guest, lm, measures, memory, norms, scaling, seeds, startup, step, sweep
from benchmarks.measuring import Ratio, Time

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"

# Output -----------------------------------------------------------------------------------------------------------

Rows = list[Ratio | Time]

SUITES: dict[str, Callable[[int, torch.device, Path | None], Iterator[Ratio | Time]]] = {
    "cifar10": cifar10.cifar10,
    "data": data.data,
    "guest": lambda rounds, device, root: guest.guest(rounds, device),
    "lm": lambda rounds, device, root: lm.lm(rounds, device),
    "measures": lambda rounds, device, root: measures.measures(rounds, device),
    "memory": lambda rounds, device, root: memory.memory(rounds, device),
    "norms": lambda rounds, device, root: norms.norms(rounds, device),
    "seeds": lambda rounds, device, root: seeds.seeds(rounds, device),
    "step": lambda rounds, device, root: step.step(rounds, device),
    "scaling": lambda rounds, device, root: scaling.scaling(rounds, device),
    "startup": lambda rounds, device, root: startup.startup(rounds, device),
    "sweep": lambda rounds, device, root: sweep.sweep(rounds, device),
}


def tables(rows: Rows) -> str:
    """Return a table of ratios and, below it, one of times without a peer."""
    unit = next((row.unit for row in rows if isinstance(row, Ratio)), "")
    ratios = [f"| where | what | against | ratio (quartiles) | {unit} |", "|---|---|---|---|---|"]
    times = ["| where | what | s (quartiles) |", "|---|---|---|"]
    for row in rows:
        spread = f"{row.median:.2f} ({row.first_quartile:.2f} to {row.third_quartile:.2f})"
        if isinstance(row, Ratio):
            ratios.append(f"| {row.place} | {row.what} | {row.peer} | {spread} | {row.ours:.1f} |")
        else:
            times.append(f"| {row.place} | {row.what} | {spread} |")
    return "\n\n".join("\n".join(lines) for lines in (ratios, times) if len(lines) > 2)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in cpuinfo.read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def write(suite: str, rows: Rows, heading: str) -> None:
    """Write the tables between the markers of a suite in docs/benchmarks.md, and the numbers to a JSON file.

    Args:
        suite: its name, with the suffix `_gpu` for results from a GPU.
    """
    begin, end = f"<!-- {suite} -->", f"<!-- end of {suite} -->"
    assert begin in PAGE.read_text(encoding="utf-8"), f"{PAGE.name} lacks the mark {begin}"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n{heading}\n\n{tables(rows)}\n{end}{after}", encoding="utf-8")
    numbers = {
        "heading": heading,
        "ratios": [asdict(row) for row in rows if isinstance(row, Ratio)],
        "times": [asdict(row) for row in rows if isinstance(row, Time)],
    }
    (PAGE.parent / f"benchmark_{suite}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--rounds", type=int, default=40, help="number of pairs of times (default: 40)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--root", type=Path, help="a folder with the parquet files of CIFAR-10, for data and cifar10")
    parser.add_argument("--write", action="store_true", help="write the table to docs/benchmarks.md")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    device = torch.device(chosen.device)
    command = f"python scripts/benchmark.py {chosen.suite} --rounds {chosen.rounds} --threads {chosen.threads}"
    command += " --root FOLDER" if chosen.root else ""
    heading = f"{machine(device)}; torch {torch.__version__}, Python {platform.python_version()}; `{command}`"
    print(heading)
    rows = []
    for row in SUITES[chosen.suite](chosen.rounds, device, chosen.root):
        rows.append(row)
        peer, ms = (row.peer, f"{row.ours:.1f} {row.unit}") if isinstance(row, Ratio) else ("", "s")
        print(f"{row.place:14} {row.what:32} {peer:18} {row.median:.2f}  {ms}", flush=True)
        if chosen.write:  # after each row: a long suite may be interrupted
            write(chosen.suite + "_gpu" * (device.type == "cuda"), rows, heading)


if __name__ == "__main__":
    main()
