"""Numbers by step for TensorBoard, written at once: a writer with a thread of its own would hide a full disk, and then wait for ever."""

from __future__ import annotations

import pathlib
import time


class EventFile:
    """An event file of one session of a run.

    Args:
      directory: made if it does not exist. step: what an earlier session wrote of later steps is hidden.
    """

    def __init__(self, directory: pathlib.Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        self._event, self._scalar = event_pb2.Event, scalar
        directory.mkdir(parents=True, exist_ok=True)
        # The name holds the time, which may be that of another session if clocks are turned back.
        self._writer = EventsWriter(str(directory / "events"), f".{step}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes numbers by name, such as 'train/loss'."""
        for name, value in values.items():
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
