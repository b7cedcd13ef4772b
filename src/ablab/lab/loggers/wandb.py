"""Weights & Biases: online where someone is logged in, offline where not, and never in the way of training."""

from __future__ import annotations

import netrc
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from ablab.errors import FINISHED, STOPPED
from ablab.lab.loggers.csv_file import as_logged
from ablab.lab.run.folder import relpath
from ablab.lab.run.redaction import first_line, redact

DEFAULT_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # `wandb login` has written one, later the other

LONGEST_NAME = 128  # characters of a project and of a run's name
LONGEST_TAG = 64
UNWANTED = r"[/\\#?%:]"  # in a project's name


class WandB(WandbLogger):
    """A W&B run for one run of ours: the same id, the same rows in the same order, the same exit code.

    Row i of metrics.csv is W&B's step i, however often the run is interrupted and wherever its parts were uploaded
    from. A resumed run sends what the server lacks; offline it writes a folder that is complete by itself, and those
    of before go into `wandb/earlier`. No failure of W&B reaches training: what cannot be uploaded stays in the
    run's folder, and what to do about it is printed.

    Whatever else is logged, by `log_image` and its like, `experiment.log`, `wandb.log` or `watch`, goes with the next
    row, since a step of its own would shift the rows after it; of two values by one name it is the later one.

    Args:
        project, entity, group, tags, notes: as W&B has them.
        save_dir: the run's folder; W&B's files go into `wandb` there.
        mode: "auto" is online with a login (WANDB_API_KEY, or `wandb login`) and offline without; the environment
            variable WANDB_MODE overrides "auto".
        init_timeout: seconds that a server has to answer in the beginning; after that the run is an offline one.
        finish_timeout: seconds that it has in the end to take what is left.
    """

    def __init__(
        self,
        *,
        project: str,
        save_dir: str | Path,
        mode: Literal["auto", "online", "offline"] = "auto",
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        init_timeout: float = 15.0,
        finish_timeout: float = 30.0,
    ) -> None:
        if os.environ.get("WANDB_MODE") in ("disabled", "dryrun"):
            raise ValueError(
                f"WANDB_MODE={os.environ['WANDB_MODE']}: online and offline are understood; logger=csv leaves W&B out"
            )
        project = project or os.environ.get("WANDB_PROJECT", "")
        check_names(project=project, entity=entity)
        check_tags(tags or [])
        for name, value in {"init_timeout": init_timeout, "finish_timeout": finish_timeout}.items():
            if not value > 0:
                raise ValueError(f"{name}={value}: it is a number of seconds, and greater than 0")
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_MODE", "online") == "online" and logged_in() else "offline"
        if mode == "online" and not logged_in():
            raise ValueError(
                "mode=online: no login was found; run `wandb login`, set WANDB_API_KEY, or take mode=offline"
            )
        self.mode = mode
        self.init_timeout = init_timeout
        self.finish_timeout = finish_timeout
        self.num_rows = 0  # that the run has logged
        self.num_there = 0  # that the server had when this process began
        self.with_next_row: dict[str, Any] = {}  # to be logged with the next row
        self.stand_in: Any = None  # for W&B's run, where there is none
        super().__init__(
            save_dir=str(save_dir),
            name=Path(save_dir).name[:LONGEST_NAME],
            project=project,  # it and the entity say where the copy goes
            entity=entity,
            **redact({"group": group, "tags": tags, "notes": notes}),
        )
        self._wandb_init.pop("anonymous")  # W&B warns of the setting, even when it is None

    @rank_zero_only
    def begin(self, run_id: str, rows: Sequence[Mapping[str, float]] = ()) -> None:
        """Start the W&B run, say where it is, and give it what was logged before.

        Args:
            run_id: W&B's id of the run, too.
            rows: of metrics.csv, as far as a resumed run keeps them; whatever follows is logged again.
        """
        # W&B reads both when it starts. `begin` says what matters; and its telemetry waits, as the program ends, 20 s
        # for a server that does not answer.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._id = run_id
        reason = "" if logged_in() else "no login found"
        if self.mode == "online":
            try:
                self.start(resume="allow")
            except Exception as error:
                self.mode, reason = "offline", f"the server cannot be used: {first_line(error)}"
                leave_wandb()  # it would not start another run with the same id
        if self.mode == "offline":
            try:
                self.start(resume=None)
            except Exception as error:
                self.give_up(error)
                return
        self.announce(reason)
        for row in rows:
            self.log_metrics(*as_logged(row))

    def start(self, *, resume: Literal["allow"] | None) -> None:
        """Start W&B's own run; a run that is resumed takes up the server's count of rows."""
        self.set_earlier_aside()
        settings = wandb.Settings(
            silent=True,
            init_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1.0,  # seconds of points that a kill may cost; W&B's default is 15
        )
        choices = {**self._wandb_init, "id": self._id, "mode": self.mode, "resume": resume, "settings": settings}
        with redacted_command():
            run = wandb.init(**choices)
        self._experiment = run
        # `experiment.log`, `wandb.log` and the hooks of `watch` all end in W&B's `_log`, which makes a step
        method = "_log" if hasattr(run, "_log") else "log"
        self.log_row = getattr(run, method)
        setattr(run, method, self.keep)
        self.num_there = run.starting_step
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)

    def set_earlier_aside(self) -> None:
        """Move W&B's folders of before to where `wandb sync` does not look: what they hold is written again."""
        parent = Path(str(self.save_dir)) / "wandb"
        folders = sorted(path for path in parent.glob(f"*run-*-{self._id}*") if path.is_dir())
        for folder in folders:
            (parent / "earlier").mkdir(exist_ok=True)
            number = len(list((parent / "earlier").iterdir())) + 1
            folder.rename(parent / "earlier" / f"{number}_{folder.name}")

    def announce(self, reason: str) -> None:
        """Say where the run is; offline, say why, how to look at it and how to upload it."""
        if self.mode == "online":
            print(f"W&B: online, {self.experiment.url}")
            return
        why = f" ({reason})" if reason else ""
        print(f"W&B: offline{why}\n  look at it:   wandb leet {self.folder}\n  upload later: {self.sync_command}")

    @property
    def experiment(self) -> Any:
        """W&B's run; where there is none, or none any more, one that takes every call and does nothing.

        It never starts a run: `begin` does, and Lightning and callbacks ask for this at any time.
        """
        if self._experiment is not None:
            return self._experiment
        if self.stand_in is None:
            try:
                self.stand_in = wandb.init(mode="disabled")
            except Exception:  # an environment variable that W&B refuses
                self.stand_in = DummyExperiment()
        return self.stand_in

    @property
    def folder(self) -> str:
        """W&B's own folder of this run."""
        return relpath(Path(self.experiment.dir).parent)

    @property
    def sync_command(self) -> str:
        """Return the command that uploads the run; W&B skips a run that began online unless asked to include it."""
        return f"wandb sync {'--include-online ' if self.mode == 'online' else ''}{self.folder}"

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        self.attempt(lambda: WandbLogger.log_hyperparams(self, redact(params)))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.num_rows += 1
        if self.num_rows > self.num_there:
            row = {**self.with_next_row, **metrics, **({} if step is None else {"trainer/global_step": step})}
            self.attempt(lambda: self.log_row(row))
        self.with_next_row = {}

    def keep(self, data: Mapping[str, Any], *arguments: Any, **settings: Any) -> None:
        """Have values wait for the next row; W&B's own step and commit are that row's."""
        self.with_next_row.update(data)

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[Any] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        # W&B asks the server for it at once, and waits; `log_text` does not
        self.keep_media(key, lambda: wandb.Table(columns=columns, data=data, dataframe=dataframe))

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.keep_media(key, lambda: [wandb.Image(image, **own) for image, own in each(images, kwargs)])

    @rank_zero_only
    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.keep_media(key, lambda: [wandb.Audio(audio, **own) for audio, own in each(audios, kwargs)])

    @rank_zero_only
    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.keep_media(key, lambda: [wandb.Video(video, **own) for video, own in each(videos, kwargs)])

    @rank_zero_only
    def log_text(
        self,
        key: str,
        columns: list[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Log a table of texts, as HTML: for a `wandb.Table` the training process itself asks the server, and waits."""
        if dataframe is not None:
            columns, data = [str(name) for name in dataframe.columns], dataframe.to_numpy().tolist()
        lines = [f"<tr><td><pre>{'</pre></td><td><pre>'.join(escape(str(cell)) for cell in row)}" for row in data or []]
        head = "".join(f"<th>{escape(name)}</th>" for name in columns or [])
        table = f"<table><tr>{head}</tr>{''.join(lines)}</table>"
        self.keep_media(key, lambda: wandb.Html(table, inject=False))

    def keep_media(self, key: str, make: Callable[[], Any]) -> None:
        """Have media wait for the next row; if they cannot be made (a package is missing), only they are left out."""
        if self._experiment is None:
            return
        try:
            self.with_next_row[key] = make()
        except Exception as error:
            print(f"W&B: {key} is left out ({type(error).__name__}: {first_line(error)})")

    @rank_zero_only
    def watch(self, model: nn.Module, log: Any = "gradients", log_freq: int = 100, log_graph: bool = True) -> None:
        self.attempt(lambda: self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph))

    def attempt(self, step: Callable[[], None]) -> None:
        """Do something with W&B; where that fails, the rest of the run does without."""
        if self._experiment is None:
            return
        try:
            step()
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Go on without W&B."""
        print(f"W&B: given up ({type(error).__name__}: {first_line(error)}); metrics.csv has everything")
        run, self._experiment = self._experiment, None
        self.with_next_row = {}
        if run is not None:
            with suppress(Exception):
                run.unwatch()
            with suppress(Exception):  # it stops W&B's threads before it can fail
                run.finish(exit_code=1)
        leave_wandb()
        _ = self.experiment  # `wandb.log` finds the stand-in, too

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """Finish the W&B run: the next run of this process must not join it, and a crash must not look finished.

        Args:
            exit_code: of the run; that of a run which was stopped on request tells W&B that it will be resumed.
        """
        run = self._experiment
        if run is None:
            if self.stand_in is not None:
                self.stand_in.finish()  # the next run of this process must not be given it
            return
        if self.with_next_row and exit_code == FINISHED:  # no row comes any more, and no resume
            self.attempt(lambda: self.log_row(self.with_next_row))
            if self._experiment is None:
                return
        problem = None
        sync_command, log = self.sync_command, Path(run.settings.log_internal)
        try:
            if exit_code == STOPPED:
                run.mark_preempting()
            run.finish(exit_code=exit_code)
            if self.mode == "online" and "fatal error" in log.read_text(errors="replace", encoding="utf-8"):
                problem = "the server refused it"  # W&B says so nowhere else
        except TimeoutError:
            problem = f"the server did not take it within finish_timeout={self.finish_timeout:g} s"
        except Exception as error:
            problem = first_line(error)
            leave_wandb()
        self._experiment = None
        if problem:
            print(f"W&B: not everything was uploaded ({problem})\n  upload it: {sync_command}")


def log_report(folder: Path, name: str, *, project: str, tables: Mapping[str, Any]) -> str:
    """Log an ablation's report: a W&B run of the ablation's group, with tables and the whole folder as an artifact.

    Args:
        folder: of the report.
        name: the ablation's, which is the group of its runs.
        project: W&B's.
        tables: data frames of pandas, by their names.

    Returns:
        where it is.

    Raises:
        ValueError: a project that W&B refuses.
    """
    check_names(project=project)
    os.environ.setdefault("WANDB_SILENT", "true")
    mode: Any = "online" if os.environ.get("WANDB_MODE", "online") == "online" and logged_in() else "offline"
    settings = wandb.Settings(silent=True, finish_timeout=60, finish_timeout_raises=True)
    with redacted_command():
        run = wandb.init(
            project=project,
            group=name,
            job_type="report",
            name=f"{name} report",
            dir=str(folder),
            mode=mode,
            settings=settings,
        )
    for title, table in tables.items():
        run.log({title: wandb.Table(dataframe=table)})
    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "_", name)[: LONGEST_NAME - 7] + "-report", type="report")
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and "wandb" not in path.parts):
        artifact.add_file(str(file), name=file.relative_to(folder).as_posix())
    run.log_artifact(artifact)
    place = str(run.url) if mode == "online" else f"wandb sync {relpath(Path(run.dir).parent)}"
    run.finish()
    return place


def check_names(*, project: str, entity: str | None = None) -> None:
    """Refuse names that W&B would refuse when the run begins.

    Raises:
        ValueError: names the setting, what is wrong with it, and what to try.
    """
    if not project:
        raise ValueError("project: W&B needs one; set logger.wandb.project or WANDB_PROJECT")
    for name, value in (("project", project), ("entity", entity or "")):
        if found := sorted(set(re.findall(UNWANTED, value))):
            raise ValueError(
                f"{name}={value}: W&B takes no {' '.join(found)} in it; choose another name, such as "
                f"{re.sub(UNWANTED, '-', value)}"
            )
        if len(value) > LONGEST_NAME:
            raise ValueError(f"{name}={value}: W&B takes at most {LONGEST_NAME} characters; choose a shorter name")


def check_tags(tags: Sequence[str]) -> None:
    """Refuse tags that W&B would refuse when the run begins, and a tag that is given twice.

    Raises:
        ValueError: names the tag, what is wrong with it, and what to try.
    """
    for tag in tags:
        if not 0 < len(tag) <= LONGEST_TAG:
            raise ValueError(f"tags: {tag!r} has {len(tag)} characters; W&B takes 1 to {LONGEST_TAG}")
    if twice := sorted({tag for tag in tags if list(tags).count(tag) > 1}):
        raise ValueError(f"tags: {', '.join(twice)} is given twice; give it once")


def each(items: list[Any], settings: Mapping[str, list[Any]]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield each item with its own settings; all are lists of one length."""
    if not isinstance(items, list):
        raise TypeError(f"expected a list, found {type(items).__name__}")
    for name, values in settings.items():
        if len(values) != len(items):
            raise ValueError(f"expected {len(items)} items, found {len(values)} for {name}")
    for i, item in enumerate(items):
        yield item, {name: values[i] for name, values in settings.items()}


def leave_wandb() -> None:
    """End W&B's own process, with whatever runs it has."""
    with suppress(Exception):  # where it has gone already
        wandb.teardown(exit_code=1)


@contextmanager
def redacted_command() -> Iterator[None]:
    """W&B records the command that it finds."""
    command = sys.argv
    sys.argv = redact(command)
    try:
        yield
    finally:
        sys.argv = command


def logged_in() -> bool:
    """Return whether W&B finds an API key without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlparse(os.environ.get("WANDB_BASE_URL", "")).netloc
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(host) for host in ([server] if server else DEFAULT_HOSTS))
