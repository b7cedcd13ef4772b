"""A W&B server in miniature: what the real client and `wandb sync` need, kept per run, with every way to be unwell."""

from __future__ import annotations

import json
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal
from urllib.parse import unquote

Mode = Literal["healthy", "stalls", "resets", "errors", "forbids"]


@dataclass
class Uploaded:
    """What the server knows of a run.

    Lines of the history are kept by their offset, as W&B's file stream addresses them: what is sent twice to the same
    place is there once.
    """

    name: str
    lines: dict[int, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    exit_code: int | None = None
    preempting: bool = False

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged rows as they came, W&B's own columns included."""
        return [json.loads(line) for _, line in sorted(self.lines.items())]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The logged rows by W&B's `_step`, its own columns left out; what came twice must be the same."""
        found: dict[int, dict[str, Any]] = {}
        for line in self.history:
            row = {name: value for name, value in line.items() if not name.startswith("_")}
            assert found.setdefault(line["_step"], row) == row
        return [found[step] for step in sorted(found)]

    def forget(self, number: int) -> None:
        """As if a kill had come before the last lines were sent; the summary travels with them."""
        self.lines = dict(sorted(self.lines.items())[: len(self.lines) - number])
        self.summary = self.history[-1]


class Server:
    """Serves on a free port of this machine while it is a context manager.

    Args:
        mode: how it answers: "healthy"; "stalls" reads and never answers; "resets" closes the connection; "errors"
            answers 500, which the client tries again, "forbids" 403, which it does not.
        lines: how many lines of history it takes before it becomes `then`; None: as many as come.
        then: the mode after that.
    """

    def __init__(self, mode: Mode = "healthy", *, lines: int | None = None, then: Mode = "resets") -> None:
        self.mode: Mode = mode
        self.lines = lines
        self.then: Mode = then
        self.runs: dict[str, Uploaded] = {}
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Answer,), {"owner": self}))
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> Server:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Listen no more: from now on connections are refused."""
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer; what is not known here is null, as a server's optional fields are."""
        if "upsertBucket" in query:
            return {"upsertBucket": self.upsert(variables)}
        if "query RunResumeStatus" in query:
            return {"model": {**PROJECT, "bucket": self.resume_status(variables["name"])}}
        if "createRunFiles" in query:
            names, run = variables["files"], variables["run"]
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{run}/{name}"} for name in names]
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        if "query Viewer" in query:
            return {
                "viewer": {
                    "id": "u",
                    "entity": "someone",
                    "username": "someone",
                    "email": "",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
            }
        if "serverInfo" in query:
            return {"serverInfo": {"features": []}}
        return {}

    def upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"] or variables["id"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Uploaded(name))
        if variables.get("config"):
            run.config = {key: value["value"] for key, value in json.loads(variables["config"]).items()}
        if variables.get("summaryMetrics"):
            run.summary = json.loads(variables["summaryMetrics"])
        bucket = {
            "id": name,
            "name": name,
            "displayName": variables.get("displayName") or name,
            "description": "",
            "config": "{}",
            "sweepName": None,
            "project": PROJECT,
            "historyLineCount": len(run.lines),
        }
        return {"bucket": bucket, "inserted": inserted}

    def resume_status(self, name: str) -> dict[str, Any] | None:
        if name not in self.runs:
            return None
        run = self.runs[name]
        tail = [line for _, line in sorted(run.lines.items())][-1:]
        config = {key: {"value": value} for key, value in run.config.items()}
        return {
            "id": name,
            "name": name,
            "displayName": name,
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "historyLineCount": len(run.lines),
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "config": json.dumps(config),
            "tags": [],
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }

    def file_stream(self, name: str, body: dict[str, Any]) -> None:
        run = self.runs.setdefault(name, Uploaded(name))
        files = body.get("files") or {}
        if history := files.get("wandb-history.jsonl"):
            run.lines |= dict(enumerate(history["content"], history["offset"]))
        if summary := files.get("wandb-summary.json"):
            run.summary = json.loads(summary["content"][-1])
        if body.get("complete"):
            run.exit_code = body.get("exitcode")
        run.preempting |= bool(body.get("preempting"))
        if self.lines is not None and sum(len(run.lines) for run in self.runs.values()) >= self.lines:
            self.mode = self.then


PROJECT = {"id": "p", "name": "ablab", "entity": {"id": "e", "name": "someone"}}


class Answer(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    owner: Server

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client has gone
            self.close_connection = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = self.owner
        with server.lock:
            server.requests.append(self.path)
            server.bodies.append(body)
            mode = server.mode
        if mode == "stalls":
            server.closing.wait()
        if mode in ("stalls", "resets") or server.closing.is_set():
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        if mode in ("errors", "forbids"):
            self.answer(500 if mode == "errors" else 403, {"error": "on purpose"})
            return
        with server.lock:
            self.answer(200, self.understand(body))

    do_GET = do_PUT = do_POST

    def understand(self, body: bytes) -> dict[str, Any]:
        match self.path.strip("/").split("/"):
            case ["graphql"]:
                request = json.loads(body)
                return {"data": self.owner.graphql(request["query"], request.get("variables") or {})}
            case ["files", _, _, run, "file_stream"]:
                self.owner.file_stream(run, json.loads(body))
            case ["upload", run, *name]:
                self.owner.runs[run].files.add(unquote("/".join(name)))
        return {}

    def answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """Tests read what was sent, not a log."""
