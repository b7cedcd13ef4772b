"""Several processes of one run, that really run: one folder, one W&B run, one end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from tests import forked
from tests.polling import LIMIT, accepts_connections, wait_until
from tests.runs import wandb_file

from ablab.errors import DIVERGED, ConfigError, Stopped
from ablab.lab.launch.processes import is_lost_connection
from ablab.lab.launch.torchrun import Rendezvous
from ablab.lab.loggers.csv_file import read_rows
from ablab.lab.run import signals
from ablab.lab.run.checkpoint_files import BEST, read_weights

ROOT = Path(__file__).parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ("trainer.max_epochs=1", "trainer.limit_train_batches=4", "trainer.log_every_n_steps=1")


def torchrun(tmp_path: Path, *words: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={processes}",
            str(ROOT / "train.py"),
            *words,
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def as_torchrun(tmp_path: Path, *words: str) -> list[subprocess.CompletedProcess[str]]:
    """Start two processes with the environment that torchrun gives them, without its own start of seconds."""
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        forked.Popen(
            [sys.executable, str(ROOT / "train.py"), *words],
            cwd=tmp_path,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.wait(), *streams)
        for process, streams in zip(processes, said, strict=True)
    ]


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


@pytest.mark.slow
def test_a_sweep_of_runs_of_two_processes_is_one_folder_and_one_wandb_run_a_cell(
    command: Command, tmp_path: Path
) -> None:
    """Also when a cell fails: it ends all its processes, and the next cells are as without it."""
    fault = "+callbacks.fault={_target_:tests.ablation.faulty.RaisesWith,batch_norm:true,rank:1}"
    words = ("-m", "trainer=ddp_cpu", "logger=wandb", "norm=batchnorm,groupnorm", "seed=0", "name=sweep_norm", *SMALL)
    result = command(*words, fault, PYTHONPATH=str(ROOT))
    assert result.returncode == 1
    runs = sorted(tmp_path.glob("runs/sweep_norm/*/run.json"))
    assert len(runs) == 2
    for path in runs:
        [file] = path.parent.glob("wandb/offline-run-*/*.wandb")
        config, here = wandb_file.config(file), record(path.parent)
        assert f"norm={config['norm']['_target_'].rpartition('.')[2].lower()}" in path.parent.name
        if "batchnorm" in path.parent.name:
            assert here["status"] == "failed"
            assert "process 1 of this run: RuntimeError: a bug in the second step" in here["error"]
            assert wandb_file.exit_code(file) == 1
        else:
            assert here["status"] == "finished"
            assert wandb_file.exit_code(file) == 0
            assert len(wandb_file.history(file)) == len((path.parent / "metrics.csv").read_text().splitlines()) - 1
    assert "1 of 2 runs finished" in result.stdout


@pytest.mark.slow
def test_a_run_of_one_process_leaves_nothing_to_the_next_run_of_its_sweep(command: Command, tmp_path: Path) -> None:
    words = ("trainer=ddp_cpu", "norm=groupnorm", "logger=csv", *SMALL)
    for more in (("trainer.devices=2", "folder=alone"), ("trainer.devices=1,2", "output_dir=sweep", "-m")):
        done = command(*more[::-1], *words, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
    cells = [record(path.parent) for path in (tmp_path / "sweep").glob("*/*/run.json")]
    assert sorted(cell["processes"] for cell in cells) == [1, 2]
    [second] = [cell for cell in cells if cell["processes"] == 2]
    assert second["weights_sha256"] == record(tmp_path / "alone")["weights_sha256"]


@pytest.mark.slow
def test_what_a_process_has_started_ends_with_it(command: Command, tmp_path: Path) -> None:
    bug = ("+callbacks.bug._target_=tests.ablation.faulty.LeavesAChild", f"+callbacks.bug.file={tmp_path}/child")
    done = command("trainer=ddp_cpu", "logger=csv", *SMALL, *bug)
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: a bug\n") in (1, 2)
    child = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def allocation(tasks_per_node: int) -> dict[str, str]:
    """What Slurm sets in an allocation of two tasks, where a program is started without srun."""
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "x",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": str(tasks_per_node),
        "SLURM_NNODES": str(2 // tasks_per_node),
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "tasks_per_node", "processes"),
    [
        pytest.param("trainer=ddp_cpu trainer.strategy.timeout=20", 1, 2, marks=pytest.mark.thorough),
        ("trainer=ddp_cpu trainer.strategy.timeout=20", 2, 2),
        pytest.param("trainer=cpu trainer.strategy=ddp trainer.devices=2", 2, 2, marks=pytest.mark.thorough),
        ("trainer=cpu", 1, 1),
    ],
)
def test_in_an_allocation_of_slurm_without_srun_a_run_starts_its_processes(
    words: str, tasks_per_node: int, processes: int, command: Command, tmp_path: Path
) -> None:
    small = ("logger=csv", "folder=run", *SMALL)
    done = command(*words.split(), *small, OMP_NUM_THREADS="1", **allocation(tasks_per_node))
    assert done.returncode == 0, done.stderr
    assert record(tmp_path / "run")["processes"] == processes


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(s, marks=pytest.mark.thorough) for s in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)),
    ],
)
def test_a_process_that_waits_for_others_leaves_at_once(number: signal.Signals, tmp_path: Path) -> None:
    """As torchrun starts the first of two, when the second never comes."""
    port = free_port()
    outside = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    process = forked.Popen(
        [sys.executable, str(ROOT / "train.py"), "trainer=ddp_cpu", "logger=csv"],
        cwd=tmp_path,
        env={**os.environ, **outside, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_until(lambda: accepts_connections(port), process)
        process.send_signal(number)
        assert process.wait(LIMIT) == -number
    finally:
        process.kill()
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.slow
def test_torchrun_makes_one_run_with_the_weights_of_the_runs_own_launcher(command: Command, tmp_path: Path) -> None:
    words = ("trainer=ddp_cpu", "logger=wandb", *SMALL)
    own = command(*words, "output_dir=own", OMP_NUM_THREADS="1")
    assert own.returncode == 0, own.stderr
    outer = torchrun(tmp_path, *words, "output_dir=outer")
    assert outer.returncode == 0, outer.stderr
    [first], [second] = (list((tmp_path / name).iterdir()) for name in ("own", "outer"))
    assert record(first)["weights_sha256"] == record(second)["weights_sha256"]
    assert (first / "metrics.csv").read_text() == (second / "metrics.csv").read_text()
    assert len(list(second.glob("wandb/offline-run-*"))) == 1
    assert outer.stdout.count("best checkpoint by") == 1


@pytest.mark.slow
def test_processes_that_have_composed_different_configs_do_not_train(tmp_path: Path) -> None:
    words = ("trainer=ddp_cpu", "logger=csv", 'optimizer.lr="${oc.decode:0.${oc.env:RANK}1}"')
    done = as_torchrun(tmp_path, *words)
    assert all(process.returncode for process in done)
    said = "error: the processes of this run have composed different configs:\n  optimizer.lr: 0.01 in process 0, 0.11 "
    assert "".join(process.stderr for process in done).count(said) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["-m", "trainer=ddp_cpu", "seed=0,1"],
            "error: -m under torchrun: each of its processes would do the whole swe",
        ),
        (
            ["trainer=cpu"],
            "error: trainer.devices, trainer.num_nodes: they make 1 processes, and torchrun has started 2",
        ),
        (["trainer=ddp_cpu", "resume=nowhere"], "error: resume=nowhere: it is not a run's folder"),
    ],
)
def test_what_cannot_be_under_torchrun_is_said_once(tmp_path: Path, words: list[str], message: str) -> None:
    done = as_torchrun(tmp_path, *words, "logger=csv")
    assert all(process.returncode for process in done)
    assert "".join(process.stderr for process in done).count(message) == 1
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.slow
@pytest.mark.parametrize("several", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_the_same_training_on_one_process_and_on_several(command: Command, tmp_path: Path, several: int) -> None:
    """In float64, gradients are equal to rounding; the metrics are over exactly the data set."""
    steps = ("trainer.precision=64-true", "norm=groupnorm", "logger=csv", *SMALL)
    weights, metrics = {}, {}
    for number in (1, several):
        many = ("trainer=ddp_cpu", f"trainer.devices={number}") if number > 1 else ("trainer=cpu",)
        done = command(*steps, *many, f"output_dir=on{number}", OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        [folder] = (tmp_path / f"on{number}").iterdir()
        weights[number] = read_weights(folder / "checkpoints" / BEST)
        metrics[number] = record(folder)["metrics"]
    for name, value in metrics[several].items():  # torchmetrics keeps confidences in float32
        assert value == pytest.approx(metrics[1][name], rel=1e-6 if "calibration" in name else 1e-10), name
    for name, value in weights[several].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-12, atol=1e-12)


def cut_short(folder: Path, copy: Path, last: str) -> Path:
    """What a run's folder was when it had just written a checkpoint and was killed."""
    shutil.copytree(folder, copy)
    for path in copy.glob("checkpoints/*.ckpt"):
        if path.name > last:
            path.unlink()
    (copy / "run.json").write_text(json.dumps({**record(copy), "status": "running"}))
    return copy


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(command: Command, tmp_path: Path) -> None:
    """In the middle of an epoch, on fewer and on more: samples, metrics and weights are the run's, to rounding."""
    every_step = ("callbacks.checkpoints.every_n_steps=1", "callbacks.checkpoints.keep=99")
    words = ("trainer=ddp_cpu", "norm=groupnorm", "trainer.precision=64-true", "logger=csv", *every_step, *SMALL)
    for number in (2, 1):
        done = command(*words, f"trainer.devices={number}", f"folder=on{number}", OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
    weights, rows = read_weights(tmp_path / "on2" / "checkpoints" / BEST), read_rows(tmp_path / "on2")
    for before, now in ((2, 1), (1, 2)):
        copy = cut_short(tmp_path / f"on{before}", tmp_path / f"from{before}", "00000002-training.ckpt")
        done = command(f"resume={copy}", f"trainer.devices={now}", OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        assert "resumed from 00000002-training.ckpt" in done.stdout
        assert f"processes: {before} then, {now} now" in done.stderr
        assert record(copy)["resumed"][0]["processes"] == now
        for name, value in read_weights(copy / "checkpoints" / BEST).items():
            torch.testing.assert_close(value, weights[name], rtol=1e-12, atol=1e-12)
        for row, expected in zip(read_rows(copy), rows, strict=True):  # confidences are kept in float32
            assert row == pytest.approx(expected, rel=1e-6)
            assert row.get("train/accuracy") == expected.get("train/accuracy")


@pytest.mark.slow
def test_other_processes_that_would_make_another_run_are_refused(command: Command, tmp_path: Path) -> None:
    """Batch norm would see other batches; gradients of 16 bits are other gradients."""
    assert command("trainer=ddp_cpu", "logger=csv", "folder=run", *SMALL).returncode == 0
    copy = cut_short(tmp_path / "run", tmp_path / "copy", "00000000-training.ckpt")
    before = (copy / "run.json").read_text()
    refused = command(f"resume={copy}", "trainer.devices=1")
    assert refused.returncode == 2
    assert refused.stderr.count("its norm sees 16 samples at once on 2 processes, and would see 32 on 1") == 1
    refused = command(f"resume={copy}", "trainer=ddp_cpu", "trainer.strategy.compression=bf16")
    assert refused.returncode == 2
    assert "trainer.strategy.compression: None in the run, bf16 now" in refused.stderr
    assert (copy / "run.json").read_text() == before
    assert command(f"resume={copy}").returncode == 0


FSDP = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.deterministic=true")
SHARDED = {
    "resnet": ("norm=syncbatchnorm", "norm/weight=weight_norm", "optimizer=sgd"),
    "transformer": (
        *("model=transformer", "data=text", "data.context_length=16", "optimizer=adamw", "trainer.gradient_clip_val=1"),
        *("data.micro_batch_size=4", "trainer.limit_val_batches=2", "trainer.limit_test_batches=2"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", pytest.param("transformer", marks=pytest.mark.thorough)])
def test_with_a_part_of_every_weight_training_is_the_same(name: str, command: Command, tmp_path: Path) -> None:
    """FSDP on two processes against one process with all: equal to rounding. It goes on to the same bits."""
    every_step = ("callbacks.checkpoints.every_n_steps=1", "callbacks.checkpoints.keep=99")
    words = (*SHARDED[name], "trainer.precision=64-true", "logger=csv", *SMALL, *every_step)
    for folder, several in (("one", ("trainer=cpu",)), ("two", FSDP)):
        done = command(*words, *several, f"folder={folder}", OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
    weights = {folder: read_weights(tmp_path / folder / "checkpoints" / BEST) for folder in ("one", "two")}
    for key, value in weights["two"].items():
        torch.testing.assert_close(value, weights["one"][key], rtol=1e-7, atol=1e-10)
    copy = cut_short(tmp_path / "two", tmp_path / "copy", "00000002-training.ckpt")
    assert command(f"resume={copy}", OMP_NUM_THREADS="1").returncode == 0
    assert record(copy)["weights_sha256"] == record(tmp_path / "two")["weights_sha256"]
    assert (copy / "metrics.csv").read_text() == (tmp_path / "two" / "metrics.csv").read_text()
    copy = cut_short(tmp_path / "two", tmp_path / "on1", "00000002-training.ckpt")
    done = command(f"resume={copy}", "trainer.devices=1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for key, value in read_weights(copy / "checkpoints" / BEST).items():
        torch.testing.assert_close(value, weights["two"][key], rtol=1e-7, atol=1e-10)


class SameBuffers(L.Callback):
    """Fails where the processes of a run do not score the same averages."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, buffer in pl_module.named_buffers():
            if buffer.is_floating_point():
                largest, smallest = buffer.clone(), -buffer
                dist.all_reduce(largest, dist.ReduceOp.MAX)
                dist.all_reduce(smallest, dist.ReduceOp.MAX)
                assert torch.equal(largest, -smallest), name

    on_test_end = on_validation_end


@pytest.mark.slow
@pytest.mark.parametrize(
    "several", [pytest.param(FSDP, marks=pytest.mark.thorough), ("trainer=ddp_cpu",)], ids=["fsdp", "ddp"]
)
def test_all_processes_score_the_same_running_averages(
    several: tuple[str, ...], command: Command, tmp_path: Path
) -> None:
    witness = "+callbacks.witness={_target_:tests.runs.test_processes.SameBuffers}"
    done = command(*several, "norm=batchnorm", "logger=csv", witness, *SMALL, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+callbacks/measure=drift"], "callbacks.drift: it works on a copy of the model"),
        (["callbacks=ema"], "callbacks.ema: it works on a copy of the model"),
        (["trainer.accelerator=gpu"], "trainer.accelerator=gpu: this machine has none"),
    ],
)
def test_what_needs_the_whole_model_is_refused_where_each_process_has_a_part(
    words: list[str], message: str, run: Callable[..., Any]
) -> None:
    if words == ["trainer.accelerator=gpu"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=message):
        run(*FSDP, *words)


@pytest.mark.slow
def test_a_run_of_two_processes_that_another_has_is_refused_once(command: Command, tmp_path: Path) -> None:
    words = ("trainer=ddp_cpu", "logger=csv", "folder=mine", *SMALL)
    assert command(*words).returncode == 0
    again = command(*words, "optimizer.lr=0.3")
    assert again.returncode == 2
    assert again.stderr.count("error: ") == 1
    assert "it would become another run" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.thorough)])
def test_a_process_that_is_killed_or_hangs_ends_all(how: str, faults: Any, tmp_path: Path) -> None:
    harness = faults.Harness(tmp_path, seed=len(how))
    assert harness.fail(how, 2)([*faults.run_overrides("rnn", 0, 2), f"output_dir={tmp_path}/failed"])
    assert harness.slowest <= faults.LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["raise", *(pytest.param(how, marks=pytest.mark.thorough) for how in ("SIGKILL", "SIGSTOP"))]
)
def test_a_process_that_fails_ends_all_and_the_run_goes_on_to_the_same_bits(
    how: str, faults: Any, tmp_path: Path
) -> None:
    """The short form of python scripts/faults.py --kills 0 --ranks 20 --processes 2 4."""
    harness = faults.Harness(tmp_path, seed=len(how))
    differs, done = harness.disturbed(faults.run_overrides("rnn", 0, 2), how, harness.fail(how, 2), 1)
    assert (differs, len(done)) == ("", 1)
    assert harness.slowest <= faults.LIMIT


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_restarts_by_itself_and_ends_with_the_same_bits(
    faults: Any, tmp_path: Path
) -> None:
    """The first worker has the run's lock, which its data loader's workers share and must not keep."""
    harness = faults.Harness(tmp_path, seed=0)
    overrides = faults.run_overrides("rnn", 2, 2)
    differs, done = harness.disturbed(overrides, "restarted", harness.restarted(2, killed=0), 1)
    assert (differs, len(done)) == ("", 1)


@pytest.mark.slow
def test_a_quiet_run_of_two_processes_from_the_fork_server_prints_its_results_alone(
    command: Command, tmp_path: Path
) -> None:
    words = ("trainer=ddp_cpu", "logger=csv", "quiet=true", *SMALL, "folder=quiet")
    done = command(*words, ABLAB_START_METHOD="forkserver")
    assert (done.returncode, done.stderr) == (0, "")
    assert "test/accuracy" in done.stdout
    assert "epoch" not in done.stdout
    assert record(tmp_path / "quiet")["processes"] == 2


@pytest.mark.slow
def test_a_run_of_two_processes_that_diverges_says_so(command: Command, tmp_path: Path) -> None:
    done = command("trainer=ddp_cpu", "logger=csv", "optimizer.lr=1e30", *SMALL, "folder=wrong")
    assert done.returncode == DIVERGED, done.stderr
    assert record(tmp_path / "wrong")["status"] == "diverged"


def test_workers_are_not_started_after_a_request_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job: Any = SimpleNamespace(folder=tmp_path)
    monkeypatch.setattr(signals, "requested", signal.SIGUSR1)
    with pytest.raises(Stopped, match="SIGUSR1"):
        Rendezvous(job).next_rendezvous()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.num_nodes=2"], "trainer.num_nodes=2: a run starts the processes of its own machine alone; torchrun"),
        (["trainer.strategy.compression=bf16"], "trainer.strategy.compression=bf16: it is for GPUs, and this run"),
        (
            ["trainer.strategy.static_graph=true"],
            "trainer.strategy.static_graph=True, fixed_buckets=True: .* and trainer.strategy.fixed_buckets .* to false",
        ),
    ],
)
def test_what_processes_cannot_be_is_refused(words: list[str], message: str, run: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        run("trainer=ddp_cpu", *words)


def test_a_process_group_of_another_program_is_not_taken_for_the_runs(run: Callable[..., Any]) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(ConfigError, match=r"this Python process is in a process group already"):
        run("trainer=ddp_cpu")
    assert dist.is_initialized()


def listening(pids: set[int]) -> set[str]:
    """The addresses, in hexadecimal, on which processes accept connections."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


class Listening(L.Callback):
    """Writes the addresses on which a worker and the agent that has started it accept connections."""

    def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        found = listening({os.getpid(), os.getppid()})
        Path(f"addresses-{trainer.global_rank}.json").write_text(json.dumps([*found]))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc/net/tcp")
def test_processes_on_one_machine_listen_on_loopback_alone(command: Command, tmp_path: Path) -> None:
    """Also where another program's address is left over in the environment, and its port is taken."""
    with socket.create_server(("", 0)) as server:
        left = {"MASTER_ADDR": "pod-0", "MASTER_PORT": str(server.getsockname()[1]), "PYTHONPATH": str(ROOT)}
        callback = "+callbacks.own._target_=tests.runs.test_processes.Listening"
        done = command("trainer=ddp_cpu", "logger=csv", callback, *SMALL, **left)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"addresses-{rank}.json").read_text()) == ["0100007F"]


def test_only_the_words_of_a_lost_connection_are_taken_for_one() -> None:
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"
    assert is_lost_connection(RuntimeError(lost))
    assert is_lost_connection(dist.DistBackendError("NCCL communicator was aborted"))
    assert not is_lost_connection(RuntimeError("no file /data/gloo/train.parquet"))
    assert not is_lost_connection(ValueError(lost))
    assert not is_lost_connection(dist.DistNetworkError("The server socket has failed to listen: EADDRINUSE"))
