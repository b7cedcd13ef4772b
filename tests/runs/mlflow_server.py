"""A server that speaks MLflow's REST API, over MLflow's own database; mlflow-skinny can start none of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import parse_qsl, urlparse

from mlflow.entities import Metric, Param, RunStatus, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos import service_pb2 as api
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.utils.proto_json_utils import message_to_json, parse_dict

from ablab.lab.loggers.mlflow import opening

with opening(None):  # in silence
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore


class Server:
    """One experiment store behind HTTP, on this machine.

    Args:
        folder: of its database.

    Attributes:
        mode: "healthy"; "errors" answers 500, "stalls" answers nothing, "deaf" obeys and answers nothing.
    """

    def __init__(self, folder: Path) -> None:
        with opening(folder / "mlflow.db"):
            self.store = SqlAlchemyStore(f"sqlite:///{folder}/mlflow.db", str(folder))
        self.mode = "healthy"
        self.bodies: list[bytes] = []
        handler = type("Bound", (Handler,), {"server_of_mlflow": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()
        self.store._dispose_engine()

    # What MLflow's own server does with a request, each in its own words.

    def get_experiment(self, request: Any) -> Any:
        experiment = self.store.get_experiment_by_name(request.experiment_name)
        if experiment is None:
            raise MlflowException("there is none", error_code=RESOURCE_DOES_NOT_EXIST)
        return api.GetExperimentByName.Response(experiment=experiment.to_proto())

    def create_experiment(self, request: Any) -> Any:
        return api.CreateExperiment.Response(experiment_id=self.store.create_experiment(request.name))

    def create_run(self, request: Any) -> Any:
        tags = [RunTag.from_proto(tag) for tag in request.tags]
        run = self.store.create_run(request.experiment_id, request.user_id, request.start_time, tags, request.run_name)
        return api.CreateRun.Response(run=run.to_proto())

    def search_runs(self, request: Any) -> Any:
        runs = self.store.search_runs(list(request.experiment_ids), request.filter, ViewType.ACTIVE_ONLY)
        return api.SearchRuns.Response(runs=[run.to_proto() for run in runs])

    def get_run(self, request: Any) -> Any:
        return api.GetRun.Response(run=self.store.get_run(request.run_id).to_proto())

    def update_run(self, request: Any) -> Any:
        status = RunStatus.from_string(api.RunStatus.Name(request.status))
        ended = request.end_time if request.HasField("end_time") else None
        info = self.store.update_run_info(request.run_id, status, ended, request.run_name or None)
        return api.UpdateRun.Response(run_info=info.to_proto())

    def log_batch(self, request: Any) -> Any:
        self.store.log_batch(
            request.run_id,
            [Metric.from_proto(metric) for metric in request.metrics],
            [Param.from_proto(param) for param in request.params],
            [RunTag.from_proto(tag) for tag in request.tags],
        )
        return api.LogBatch.Response()

    def get_history(self, request: Any) -> Any:
        history = self.store.get_metric_history(request.run_id, request.metric_key)
        return api.GetMetricHistory.Response(metrics=[metric.to_proto() for metric in history])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_mlflow: Server
    routes: ClassVar[dict[str, tuple[Any, Callable[[Server, Any], Any]]]] = {
        "experiments/get-by-name": (api.GetExperimentByName, Server.get_experiment),
        "experiments/create": (api.CreateExperiment, Server.create_experiment),
        "runs/create": (api.CreateRun, Server.create_run),
        "runs/search": (api.SearchRuns, Server.search_runs),
        "runs/get": (api.GetRun, Server.get_run),
        "runs/update": (api.UpdateRun, Server.update_run),
        "runs/log-batch": (api.LogBatch, Server.log_batch),
        "metrics/get-history": (api.GetMetricHistory, Server.get_history),
    }

    def do_GET(self) -> None:
        self.answer(dict(parse_qsl(urlparse(self.path).query)))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server_of_mlflow.bodies.append(body)
        self.answer(json.loads(body))

    def answer(self, content: dict[str, Any]) -> None:
        mine = self.server_of_mlflow
        if mine.mode == "errors":
            self.reply(500, json.dumps({"error_code": "INTERNAL_ERROR", "message": "it is ill"}))
            return
        if mine.mode == "stalls":
            mine.ended.wait(30)
            return
        kind, do = self.routes.get(urlparse(self.path).path.partition("/mlflow/")[2], (None, None))
        if kind is None or do is None:
            self.reply(404, json.dumps({"error_code": "ENDPOINT_NOT_FOUND", "message": self.path}))
            return
        request = kind()
        parse_dict(content, request)
        try:
            status, text = 200, message_to_json(do(mine, request))
        except MlflowException as error:
            status, text = error.get_http_status_code(), error.serialize_as_json()
        if mine.mode == "deaf":
            mine.ended.wait(30)
            return
        self.reply(status, text)

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""
