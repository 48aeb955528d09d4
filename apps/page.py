"""A job's rules: it runs while somebody listens, stops on request, and ends in an answer or one line."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from apps.common import checked, printable, problem
from vfmlab.errors import VfmlabError

LOG = logging.getLogger("vfmlab.app")
GRADIO = str(Path(gr.__file__).parent)
GRACE = 10.0  # seconds from a job's start in which its client opens the stream of answers
_job: contextvars.ContextVar[str] = contextvars.ContextVar("job", default="")
_stopped: set[str] = set()


class Page(gr.Blocks):
    """Blocks in which every call of every endpoint is checked, watched and answered alike."""

    listening: Counter[str]  # open streams of answers, by session and by job

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **more: Any) -> Any:
        try:
            values = await super().preprocess_data(block_fn, inputs, *args, **more)
            return list(map(checked, block_fn.inputs, values))
        except gr.Error:
            raise
        except Exception as error:  # components raise nearly every type on values that are none of theirs
            name = block_fn.api_name or block_fn.name
            raise problem(f"'{name}' cannot be called with these values ({type(error).__name__})") from None

    async def process_api(self, block_fn: Any, inputs: list[Any], *args: Any, **more: Any) -> dict[str, Any]:
        job, session = more.get("event_id") or "", more.get("session_hash") or ""
        token = _job.set(job)
        try:
            await self._listener(job, session)
            result = await super().process_api(block_fn, inputs, *args, **more)
        except Exception as error:
            _stopped.discard(job)
            raise _shown(error, block_fn) from None
        finally:
            _job.reset(token)
        if not result.get("is_generating"):
            _stopped.discard(job)
        return result | {"data": printable(result["data"])}

    async def _listener(self, job: str, session: str) -> None:
        """Return when somebody listens to the job; an error when nobody does within GRACE."""
        event = self._queue.event_ids_to_events.get(job)
        if event is None:
            return
        while not (self.listening[session] or self.listening[job]):
            if time.monotonic() - event.enqueue_time > GRACE:
                raise problem("Nobody listens to this job; it is dropped.")
            await asyncio.sleep(0.05)

    def stop(self, session: str | None) -> None:
        """Ask all jobs of a session to end where they are; those that wait end as soon as they start."""
        _stopped.update(self._queue.pending_event_ids_session.get(session or "", ()))


def stopped() -> bool:
    """Whether the job that asks was stopped by its client."""
    return _job.get() in _stopped


def until_stopped(steps: Iterable[Any]) -> Iterator[Any]:
    """The steps, up to the one after which the job was stopped."""
    for step in steps:
        yield step
        if stopped():
            return


def _shown(error: Exception, block_fn: Any) -> gr.Error:
    """What the client reads, with one line in the log; a fault of the app is logged with its place."""
    if isinstance(error, VfmlabError):
        error = problem(str(error))
    elif isinstance(error, OSError):
        reason = error.strerror or type(error).__name__
        error = problem(f"A file of this run could not be read ({reason}). Is it deleted? Reload the page.")
    elif not isinstance(error, gr.Error):
        at = traceback.extract_tb(error.__traceback__)[-1]
        if at.filename.startswith(GRADIO):  # its own handlers and events, given nonsense
            return _shown(problem(f"This cannot be done with these values ({type(error).__name__})."),
                          block_fn)
        line = f"{type(error).__name__}: {error} at {at.filename}:{at.lineno}"
        LOG.error("vfmlab app: %s failed: %s", block_fn.api_name, ascii(line)[:400])
        return problem(f"This failed ({type(error).__name__}); the server's log says where.")
    error.print_exception = False
    line = ascii(getattr(error, "message", str(error)))[:300]
    LOG.warning("vfmlab app: %s refused: %s", block_fn.api_name, line)
    return error
