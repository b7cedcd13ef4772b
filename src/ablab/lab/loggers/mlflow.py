"""MLflow: a database file beside the runs, or a lab's server, and never in the way of training."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import shlex
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import DummyExperiment, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ablab.disk import Lock
from ablab.errors import FINISHED, STOPPED
from ablab.lab.config.schema import show
from ablab.lab.loggers.csv_file import as_logged
from ablab.lab.run.folder import relpath
from ablab.lab.run.identity import flat
from ablab.lab.run.redaction import first_line, redact, redact_addresses
from ablab.waiting import awaited

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # which begins when MLflow is imported

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

FILE = "mlflow.db"
ID = "ablab.id"  # the tag by which a run is found again, wherever it goes on
BATCH = {"metrics": 1000, "tags": 100, "params": 100}  # that MLflow takes at once
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # of what was sent, whenever it is sent
PATIENCE = 10.0  # seconds for a database file in which another process writes; MLflow itself waits 20 for each query
LONGEST = 500  # characters of a param that every server takes
SETTINGS = {  # where a person has none
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # `send` tries again, later
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
ADDRESS = re.compile(r"(https?|sqlite|(mysql|postgresql|mssql)(\+\w+)?)://|databricks")


class MLflow(Logger):
    """An MLflow run for one run of ours: metrics.csv as its metrics, the config as its params, its end as its status.

    A resumed run goes on in the same MLflow run and adds what that lacks; params stay as they were first given, since
    MLflow changes none. No failure of MLflow reaches training: what cannot be sent is sent later, and if something
    is missing in the end it is said.

    Args:
        save_dir: the run's folder.
        experiment_name: MLflow's; it is made where there is none.
        tracking_uri: of a server or a database; None is MLFLOW_TRACKING_URI, and without it `mlflow.db` beside the
            run's folder, one for all plain runs and one for each ablation.
        tags: of the run; one of an ablation has its levels, too.
    """

    def __init__(
        self,
        *,
        save_dir: str | Path,
        experiment_name: str,
        tracking_uri: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        if redact_addresses(tracking_uri or "") != (tracking_uri or ""):
            raise ValueError(
                "tracking_uri: it has a password or a token, and the run's files may have none; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or give the whole of it as MLFLOW_TRACKING_URI"
            )
        self.folder = Path(save_dir)
        self.uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.folder.parent / FILE}"
        if not ADDRESS.match(self.uri):  # MLflow 3 refuses a folder, too
            raise ValueError(
                f"tracking_uri={redact(self.uri)}: give a server, http://NAME:PORT, or a database, sqlite:///FILE"
            )
        if self.file is not None and None in map(importlib.util.find_spec, ("sqlalchemy", "alembic")):
            raise ValueError("a database file needs more packages: pip install -e '.[trackers]'")
        self.experiment_name = experiment_name
        self.tags = dict(tags or {})
        self.id = ""
        self.client: MlflowClient | None = None
        self.run: Run | None = None
        self.waiting: dict[str, list[Any]] = {kind: [] for kind in BATCH}
        self.last: dict[str, int] = {}  # the step of a metric's last value
        self.known: set[str] = set()  # params
        self.names: dict[tuple[str, str], str] = {}  # ours, by the kind and the name as MLflow takes it
        self.left_out: set[tuple[str, str]] = set()  # of a kind, by our names
        self.next = 0.0  # when what waits is to be sent
        self.problem = ""

    # Lightning asks for these three.
    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def name(self) -> str:
        return self.experiment_name

    @property
    def version(self) -> str:
        return self.id

    @property
    def experiment(self) -> Any:
        """MLflow's client, as Lightning's logger has it; one that does nothing until MLflow has been reached."""
        return self.client or DummyExperiment()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, which its client's methods take; None until MLflow has been reached."""
        return None if self.run is None else self.run.info.run_id

    @property
    def file(self) -> Path | None:
        """The database, where it is a file."""
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None

    @rank_zero_only
    def begin(self, run_id: str, rows: Sequence[Mapping[str, float]] = ()) -> None:
        """Begin the MLflow run or go on with it, and say how to look at it.

        Args:
            run_id: of the run.
            rows: of metrics.csv, as far as a resumed run keeps them; whatever follows is logged again.
        """
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        self.id = run_id
        for row in rows:
            self.keep(*as_logged(row))
        self.send()
        if self.problem:
            print(f"MLflow: {redact(self.uri)} cannot be used ({self.problem}); it is tried again during the run")
        else:
            print(f"MLflow: {self.place}")

    @property
    def place(self) -> str:
        """Where the run is seen."""
        assert self.run is not None
        if self.uri.startswith("http"):
            return f"{redact(self.uri)}/#/experiments/{self.run.info.experiment_id}/runs/{self.run.info.run_id}"
        uri = redact(self.uri) if self.file is None else f"sqlite:///{relpath(self.file)}"
        lacking = "" if importlib.util.find_spec("flask") else "   (with pip install mlflow: mlflow-skinny has no page)"
        return f"mlflow ui --backend-store-uri {shlex.quote(uri)}{lacking}"

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        params = redact(params)
        leaves = {self.name_of("params", key): show(value)[:LONGEST] for key, value in flat(params).items()}
        values = {key: value for key, value in leaves.items() if key is not None}
        self.waiting["params"] += [Param(key, value) for key, value in values.items() if key not in self.known]
        self.known |= values.keys()
        if params.get("cell"):  # of an ablation, which gives its runs its name
            levels = {"ablation": params["name"], **params["cell"]}
            tags = {self.name_of("tags", key): show(level) for key, level in levels.items()}
            self.waiting["tags"] += [RunTag(key, level) for key, level in tags.items() if key is not None]

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.keep(metrics, step or 0)
        self.save()

    def keep(self, metrics: Mapping[str, Any], step: int) -> None:
        """Have a row wait to be sent; of two values for a step, as of the epoch, it is the first that counts."""
        now = int(time.time() * 1000)
        for name, value in metrics.items():
            key = self.name_of("metrics", name)
            if key is not None and self.last.get(key, -1) < step:
                self.last[key] = step
                self.waiting["metrics"].append(Metric(key, float(value), now, step))

    def name_of(self, kind: str, name: str) -> str | None:
        """A name as MLflow takes it; None, once said, where it takes none, or has another of ours by that name."""
        if (kind, name) in self.left_out:
            return None
        first = self.names.setdefault((kind, key := named(name)), name)
        if first == name:
            return key
        self.leave_out(kind, name, f"as {key!r} it would be one with {first!r}")
        return None

    def leave_out(self, kind: str, name: str, why: str) -> None:
        self.left_out.add((kind, name))
        print(redact(f"MLflow: {name!r} of the {kind} is left out ({why}); the run's folder has it"))

    def send(self) -> bool:
        """Send what waits, and say whether it arrived.

        A server that is slow, or silent, takes no more than a tenth of the run's time.
        """
        began = time.monotonic()
        try:
            client, run_id = self.reached()
            for kind, size in BATCH.items():
                while self.waiting[kind]:
                    self.deliver(client, run_id, kind, self.waiting[kind][:size])
                    del self.waiting[kind][:size]
            self.problem = ""
        except Exception as error:
            self.problem = reason(error)
        ended = time.monotonic()
        self.next = ended + max(1.0, 9 * (ended - began))
        return not self.problem

    def deliver(self, client: MlflowClient, run_id: str, kind: str, items: list[Any]) -> None:
        """Send a batch; of one that MLflow refuses all but what it refuses, found by halving."""
        items = [item for item in items if (kind, self.names.get((kind, item.key), "")) not in self.left_out]
        if not items:
            return
        try:
            batch: dict[str, Any] = {kind: items}
            client.log_batch(run_id, **batch)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            if len(items) == 1:
                self.leave_out(kind, self.names[kind, items[0].key], f"MLflow refuses it: {reason(error)}")
                return
            half = len(items) // 2
            self.deliver(client, run_id, kind, items[:half])
            self.deliver(client, run_id, kind, items[half:])

    def reached(self) -> tuple[MlflowClient, str]:
        """The client and the id of the run in MLflow, once they can be used."""
        if self.client is None or self.run is None:
            self.reach()
        else:
            await_writable(self.file)
        assert self.client is not None
        assert self.run is not None
        return self.client, self.run.info.run_id

    def reach(self) -> None:
        """Find the run in MLflow, or begin it there."""
        with opening(self.file):
            client = MlflowClient(self.uri)
            experiment = client.get_experiment_by_name(self.experiment_name)
            if experiment is None:
                place = None if self.file is None else str(self.file.absolute().with_name("mlartifacts"))
                with contextlib.suppress(MlflowException):  # another run may just have made it
                    client.create_experiment(self.experiment_name, artifact_location=place)
                experiment = client.get_experiment_by_name(self.experiment_name)
            assert experiment is not None
            found = client.search_runs([experiment.experiment_id], f"tags.`{ID}` = '{self.id}'")
            if found:
                self.go_on(client, found[0])
                self.run = found[0]
            else:
                tags = redact(self.tags) | {ID: self.id}
                self.run = client.create_run(experiment.experiment_id, tags=tags, run_name=self.folder.name)
            self.client = client

    def go_on(self, client: MlflowClient, run: Run) -> None:
        """Take up what MLflow has of the run: it keeps whatever it gets, once or twice."""
        client.update_run(run.info.run_id, status="RUNNING")
        histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        there = {key: max(metric.step for metric in history) for key, history in histories.items()}
        waiting = self.waiting
        waiting["metrics"] = [metric for metric in waiting["metrics"] if metric.step > there.get(metric.key, -1)]
        waiting["params"] = [param for param in waiting["params"] if param.key not in run.data.params]
        for key, step in there.items():
            self.last[key] = max(step, self.last.get(key, -1))
        self.known |= run.data.params.keys()

    @rank_zero_only
    def save(self) -> None:
        """Send what waits if it is time to; Lightning asks often."""
        if time.monotonic() > self.next:
            self.send()

    def finalize(self, status: str) -> None:
        """Lightning calls this after the training and after the test; the run ends once, in `close`."""

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """End the MLflow run, with all that waits; what fails is tried once more, and no oftener.

        Args:
            exit_code: of the run; one that was stopped on request is KILLED, one that went wrong FAILED.
        """
        status = {FINISHED: "FINISHED", STOPPED: "KILLED"}.get(exit_code, "FAILED")
        sent = self.send()
        ended = self.end(status) or (sent and self.end(status))
        if ended and not sent:
            sent = self.send()
        if not (sent and ended):
            print(f"MLflow: not everything has arrived ({self.problem}); metrics.csv has it")

    def end(self, status: str) -> bool:
        """Write how the run ended, and say whether it arrived."""
        try:
            client, run_id = self.reached()
            client.set_terminated(run_id, status)
        except Exception as error:
            self.problem = reason(error)
            return False
        return True


def named(name: str) -> str:
    """A name as MLflow takes it, which is that of a file."""
    parts = re.sub(r"[^\w./: -]", "_", name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "_"


def reason(error: BaseException) -> str:
    """The first line of an error; of a request that failed, what was wrong with the connection."""
    while str(error).startswith(("API request", "HTTPConnection", "HTTPSConnection")):
        if (below := error.__cause__ or error.__context__) is None:
            break
        error = below
    return first_line(error)


@contextlib.contextmanager
def opening(file: Path | None) -> Iterator[None]:
    """Open a database in silence, and alone: the first to do so makes its tables."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints what it raises, in 100 lines
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy is deprecated")  # MLflow's own
        if file is not None:
            with awaited(f"MLflow: waiting for another process that opens {relpath(file)}"):
                lock = Lock(file.with_name(f".{file.name}.lock"))
                if not lock.acquire(seconds=60):
                    raise TimeoutError(f"{lock.path}: another process has had it for a minute")
                stack.callback(lock.release)
            await_writable(file)
        yield


def await_writable(file: Path | None) -> None:
    """Wait until nobody else writes into a database.

    Raises:
        OperationalError: somebody does for longer than we have patience.
    """
    if file is not None and file.exists():
        with contextlib.closing(sqlite3.connect(file, timeout=PATIENCE, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
