"""Measure speed against a peer in the same process: pairs, taken in turns, and the spread of their ratios.

    python scripts/benchmark.py norms            print the table
    python scripts/benchmark.py norms --write    and put it into docs/benchmarks.md, the numbers beside it as JSON
    python scripts/benchmark.py data --threads 2 --root FOLDER
    python scripts/benchmark.py cifar10 --rounds 5 --root FOLDER

A ratio of 1.00 is the peer's speed, 2.00 takes twice as long. Each is the median over the rounds of the two times of
one round, with the quartiles; absolute times depend on what else the machine does, ratios much less.
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

# What is written --------------------------------------------------------------------------------------------------

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
    """Ratios, and below them what has no peer."""
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
    """Put the tables between the suite's marks in docs/benchmarks.md, and the numbers into a JSON file.

    Args:
        suite: its name, with `_gpu` behind it where it was measured on one.
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
    parser.add_argument("--rounds", type=int, default=40, help="pairs of times, 40")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU, 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--root", type=Path, help="a folder with CIFAR-10's parquet files, for data and cifar10")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
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
        if chosen.write:  # each time: a long suite may be cut off
            write(chosen.suite + "_gpu" * (device.type == "cuda"), rows, heading)


if __name__ == "__main__":
    main()
