"""TensorBoard: one event file in the run's folder that holds what metrics.csv does, resumed or not."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from torch.utils.tensorboard.summary import hparams

from ablab.errors import FINISHED, STOPPED
from ablab.lab.config.schema import show
from ablab.lab.loggers.csv_file import as_logged
from ablab.lab.run.folder import relpath
from ablab.lab.run.identity import flat
from ablab.lab.run.redaction import first_line, redact


class TensorBoard(TensorBoardLogger):
    """An event file in `tensorboard`: a scalar, in 32 bits, for each value of metrics.csv, and the config as HParams.

    A resumed run writes it anew up to its checkpoint, and goes on in it: no reader meets a step twice, and what was
    logged before keeps its time. No failure of TensorBoard reaches training.

    Args:
        save_dir: the run's folder.
    """

    def __init__(self, *, save_dir: str | Path) -> None:
        # every second: what a kill may cost, and how far behind a page is
        super().__init__(save_dir, name="", version="tensorboard", default_hp_metric=False, flush_secs=1)
        self.given_up = False
        self.has_config = False
        self.last: dict[str, int] = {}  # the step of a metric's last value

    @property
    def experiment(self) -> Any:
        """The writer of the event file; one that takes every call and does nothing, where the file cannot be written.

        Lightning and callbacks ask for it at any time.
        """
        if not self.given_up:
            try:
                return super().experiment
            except OSError as error:
                self.give_up(error)
        return DummyExperiment()

    @rank_zero_only
    def begin(self, run_id: str, rows: Sequence[Mapping[str, float]] = ()) -> None:
        """Write what was logged before, and say how to look at it.

        Args:
            run_id: TensorBoard knows the run by its folder instead.
            rows: of metrics.csv, as far as a resumed run keeps them; whatever follows is logged again.
        """
        earlier = sorted(Path(self.log_dir).glob("events.out.tfevents.*"))
        self.attempt(lambda: self.write_again(earlier, rows))
        if not self.given_up:
            print(f"TensorBoard: tensorboard --logdir {shlex.quote(relpath(Path(self.save_dir)))}")

    def write_again(self, earlier: list[Path], rows: Sequence[Mapping[str, float]]) -> None:
        """Put one file in the place of earlier ones, which may have more than the rows, or less."""
        times = {point: time for file in earlier for point, time in times_of(file).items()}
        for row in rows:
            self.write(*as_logged(row), times)
        self.experiment.flush()
        for file in earlier:
            file.unlink()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The config as HParams; what is known of the run later is a text, since a run has one set of HParams."""
        leaves = flat(redact(params))
        # torch takes a truth value for a number
        values = {name: leaf if type(leaf) in (int, float, str) else show(leaf) for name, leaf in leaves.items()}
        if self.has_config:
            table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())]
            self.attempt(lambda: self.experiment.add_text(next(iter(params)), "\n".join(table)))
        else:
            self.has_config = True
            self.add(hparams(values, {})[1])  # without torch's list of columns: TensorBoard has one for all runs

    def add(self, summary: Summary) -> None:
        self.attempt(lambda: self.experiment._get_file_writer().add_summary(summary))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.attempt(lambda: self.write(metrics, step or 0, {}))

    def write(self, metrics: Mapping[str, Any], step: int, times: Mapping[tuple[str, int], float]) -> None:
        """Write a row, with the times at which an earlier file has its values."""
        for name, value in metrics.items():
            if self.last.get(name) != step:  # the epoch, which is in every row
                self.experiment.add_scalar(name, value, step, walltime=times.get((name, step)))
                self.last[name] = step

    @rank_zero_only
    def save(self) -> None:
        self.attempt(lambda: self.experiment.flush())

    def finalize(self, status: str) -> None:
        """Lightning calls this after the training and after the test; the file ends with the run, in `close`."""

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """Write how the run ended, and end the file.

        Args:
            exit_code: of the run; one that was stopped on request has not ended.
        """
        if exit_code != STOPPED:
            end = SessionEndInfo(status=STATUS_SUCCESS if exit_code == FINISHED else STATUS_FAILURE)
            about = metadata.create_summary_metadata(HParamsPluginData(session_end_info=end))
            self.add(Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about)]))
        self.attempt(lambda: self.experiment.close())

    def attempt(self, step: Callable[[], Any]) -> None:
        """Do something with TensorBoard; where that fails, the rest of the run does without."""
        if self.given_up:
            return
        try:
            step()
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Go on without TensorBoard."""
        self.given_up = True
        print(f"TensorBoard: given up ({type(error).__name__}: {first_line(error)}); metrics.csv has everything")


def times_of(file: Path) -> dict[tuple[str, int], float]:
    """When each scalar of an event file was logged, by its name and step."""
    events = LegacyEventFileLoader(str(file)).Load()
    return {(value.tag, event.step): event.wall_time for event in events for value in event.summary.value}
