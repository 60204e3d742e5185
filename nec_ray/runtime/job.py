"""What the entry points of `jobs/` have in common: log lines and a result as JSON, exit codes, a clean stop."""

import json
import logging
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from nec_ray.errors import ConflictError, Interrupted, NecError, RunError, StorageError, without_secrets
from nec_ray.runtime.stop import stop_on_sigterm

DONE, FINAL, RETRY = 0, 1, 75
"""Exit codes: done; an error that running again does not mend; run the same job again."""
_RETRYABLE = (ConflictError, RunError, StorageError, ConnectionError, TimeoutError)
"""The last two are OSErrors that pass; a full disk or too little memory is there again the next time."""


class JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, event, and what was given as `extra={"facts": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        return without_secrets(json.dumps(line, ensure_ascii=False, default=str))


def run_job(work: Callable[[], Mapping[str, Any]]) -> int:
    """Run a job: log lines on stderr, its result as one JSON line on stdout.

    An error that is not typed is one line too, its traceback a key of it, and final unless it is one of the network's.

    SIGTERM, as `ray job stop` sends it, stops it as Ctrl-C does: what is finished is committed.

    Args:
        work: the job; what it returns is the result.

    Returns:
        The exit code: `DONE`, `FINAL`, or `RETRY`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("nec_ray")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    stop_on_sigterm()
    try:
        result = work()
    except NecError as error:
        retry = isinstance(error, _RETRYABLE)
        facts = {"error": type(error).__name__, "retry": retry}
        logger.error(str(error), extra={"facts": facts})  # noqa: TRY400  (a user's error is one line)
        return RETRY if retry else FINAL
    except Exception as error:
        retry = isinstance(error, _RETRYABLE)
        facts = {"error": type(error).__name__, "retry": retry, "traceback": traceback.format_exc()}
        text = " ".join(str(error).split()) or "no message"
        logger.error(f"{type(error).__name__}: {text}", extra={"facts": facts})  # noqa: TRY400  (is in the facts)
        return RETRY if retry else FINAL
    except (KeyboardInterrupt, SystemExit) as stopped:
        text = str(stopped) if isinstance(stopped, Interrupted) else "stopped; run the same job again to go on"
        logger.warning(text, extra={"facts": {"retry": True}})
        return RETRY
    sys.stdout.write(json.dumps(result) + "\n")
    return DONE
