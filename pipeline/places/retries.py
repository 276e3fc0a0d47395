"""Reads that fail temporarily are repeated, a few times and in the same way everywhere.

A network mount that is remounted (ESTALE), a disk or a store that stumbles (EIO, 503), a connection that is
cut: the next try usually succeeds. A file that is missing or forbidden, or a full disk, is not tried again.
"""

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from teachercache.pipeline.errors import StorageError

_PAUSES_S = (0.1, 0.3, 1.0, 3.0)
_NO_MORE_AFTER_S = 30.0  # clients wait and retry themselves; do not multiply that by five
_PASSING = {
    *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ETIMEDOUT),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EPIPE, errno.ESHUTDOWN),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
}
# By name, since the client libraries may be missing: those of botocore and aiohttp that are not OSErrors.
_PASSING_KINDS = {"HTTPClientError", "ClientConnectionError", "ClientPayloadError", "IncompleteReadError"}
_TOO_MANY_REQUESTS, _SERVER_ERROR = 429, 500

log = logging.getLogger(__name__)
Result = TypeVar("Result")


def is_passing(error: BaseException) -> bool:
    """Whether the same read may succeed a moment later."""
    if isinstance(error, StorageError):
        return False
    if isinstance(error, OSError) and (error.errno in _PASSING or isinstance(error, TimeoutError)):
        return True
    status = getattr(error, "status", None) or getattr(error, "code", None)  # of an HTTP answer
    status = status or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and (status == _TOO_MANY_REQUESTS or status >= _SERVER_ERROR):
        return True
    return any(kind.__name__ in _PASSING_KINDS for kind in type(error).__mro__)


def retrying(read: Callable[[], Result], what: str, again: Callable[[], object] = lambda: None) -> Result:
    """What `read` returns. `again` is called before every repetition, for example to drop a stale handle.

    Raises `StorageError`, which names `what`, for a temporary error that outlasts all attempts, and any
    other error at once.
    """
    began = time.monotonic()
    for attempt, pause_s in enumerate((*_PAUSES_S, 0.0), start=1):
        try:
            return read()
        except Exception as error:
            if not is_passing(error):
                raise
            spent_s = time.monotonic() - began
            if attempt > len(_PAUSES_S) or spent_s > _NO_MORE_AFTER_S:
                reason = getattr(error, "strerror", None) or error
                raise StorageError(
                    f"{what} cannot be read at the moment.",
                    got=f"{type(error).__name__}: {reason}, {attempt} times within {spent_s:.0f} s",
                    expected="a disk, mount or store that gives the file",
                    do="look at the disk, the mount or the connection (dmesg names failing disks), then run "
                    "the same command again",
                ) from error
            log.info("%s: %s; reading it again", what, error)
        time.sleep(pause_s * random.uniform(0.5, 1.5))  # or all processes would come back at once
        again()
    raise AssertionError  # the last attempt returns or raises
