"""How long to wait for S3: a request without an answer is logged, and then given up.

botocore repeats a request five times and s3fs that five times again, so 25 attempts would wait for an
endpoint that accepts connections and says nothing. Requests answered by errors (500, 503) are still repeated.
"""

import asyncio
import logging
import time
from typing import Any
from weakref import WeakKeyDictionary

from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import HTTPClientError

from teachercache.pipeline.errors import StorageError

_READ_TIMEOUTS = 4  # to wait, of the 15 s that s3fs sets: a minute in all
_SAY_SO_AFTER_S = 5.0

log = logging.getLogger(__name__)


class PatientSession(AIOHTTPSession):
    """Counts how long a request, with all its repetitions (which share a task), goes without an answer."""

    def __init__(self, *arguments: Any, timeout: Any, **options: Any) -> None:
        super().__init__(*arguments, timeout=timeout, **options)
        self._read_timeout_s = float(timeout[1] if isinstance(timeout, (list, tuple)) else timeout)
        self._asked: WeakKeyDictionary[object, float] = WeakKeyDictionary()
        self._has_warned = False

    async def send(self, request: Any) -> Any:
        task, now = asyncio.current_task(), time.monotonic()
        asked = self._asked.setdefault(task, now)
        place = request.url.partition("?")[0]
        reminder = asyncio.get_running_loop().call_later(asked + _SAY_SO_AFTER_S - now, self._warn, place)
        try:
            answer = await super().send(request)
        except HTTPClientError as error:
            waited_s = time.monotonic() - asked
            if waited_s > (_READ_TIMEOUTS - 1) * self._read_timeout_s:  # one more would be too many
                raise self._given_up(place, waited_s, error) from error
            raise
        finally:
            reminder.cancel()
        self._asked.pop(task, None)
        self._has_warned = False
        return answer

    def _warn(self, place: str) -> None:
        if not self._has_warned:  # many requests wait for one store
            log.warning("waiting for %s, which does not answer", place)
        self._has_warned = True

    def _given_up(self, place: str, waited_s: float, error: Exception) -> StorageError:
        return StorageError(
            "The object store does not answer.",
            got=f"nothing from {place} for {waited_s:.0f} s ({type(error).__name__})",
            expected=f"an answer within the read_timeout of {self._read_timeout_s:g} s in some attempt",
            do="check AWS_ENDPOINT_URL, the proxy and the network; to wait longer: "
            """FSSPEC_S3='{"config_kwargs": {"read_timeout": 60}}'""",
        )
