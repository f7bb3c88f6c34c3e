"""Requests as they come in real life: few models are popular, many are asked for now and then.

Which model is how popular is drawn from a seed (Zipf), independent of its size. What is measured of each
request is in ``Request``; tables and pictures of that are ``report``.
"""

import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import attrs
from models import COLUMNS

CLIENTS = 8
_PAUSE = 0.04  # seconds between an answer and a client's next request, on average
_SKEW = 1.0  # the model at rank n is asked for 1/n times as often as the first


class Api:
    """One kept-alive connection to the server; for one thread at a time."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def call(self, method: str, path: str, body: Any = None) -> tuple[Any, str]:
        """Send JSON, and return the answer's JSON and its ``Server-Timing`` header.

        Raises:
            RuntimeError: the server refused.
        """
        data = None if body is None else json.dumps(body)
        self._connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:  # noqa: PLR2004 - HTTP
            raise RuntimeError(f"{method} {path}: {answer.status} {content.decode(errors='replace')}")
        return json.loads(content), answer.headers.get("Server-Timing", "")

    def __enter__(self) -> Self:
        """Return itself; the connection is made with the first call."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self._connection.close()


@attrs.frozen
class Request:
    """One request that was answered.

    Attributes:
        at: monotonic second at which it was sent.
        seconds: until the whole answer was there, as the client saw it.
        hit: whether the model was in memory.
        waited: seconds of these that the server waited for the model.
    """

    at: float
    seconds: float
    hit: bool
    waited: float


def predict(api: Api, model: str, row: Sequence[float]) -> Request:
    """Ask for one prediction."""
    started = time.monotonic()
    _, timing = api.call("POST", f"/models/{model}/predict", {"inputs": [list(row)]})
    seconds = time.monotonic() - started
    _, found, duration = timing.split(";")
    return Request(started, seconds, found == "desc=hit", float(duration.removeprefix("dur=")) / 1000)


def popularity(models: Sequence[str], seed: int = 11) -> tuple[list[str], list[float]]:
    """Return the models, most popular first, and how often each is asked for relative to the first."""
    ranked = sorted(models)
    random.Random(seed).shuffle(ranked)
    return ranked, [1 / rank**_SKEW for rank in range(1, len(ranked) + 1)]


class Load:
    """Several clients, each of which asks, waits for the answer and pauses a little, until the block ends.

    Args:
        port: of the server.
        models: their ids.

    Attributes:
        done: requests that were answered.
        errors: texts of those that were refused.
    """

    def __init__(self, port: int, models: Sequence[str]) -> None:
        self.done: list[Request] = []
        self.errors: list[str] = []
        self._port = port
        self._ranked, self._weights = popularity(models)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(seed,), daemon=True) for seed in range(CLIENTS)]

    def _ask(self, seed: int) -> None:
        chance = random.Random(seed)
        with Api(self._port) as api:
            while not self._stop.wait(chance.expovariate(1 / _PAUSE)):
                (model,) = chance.choices(self._ranked, self._weights)
                try:
                    self.done.append(predict(api, model, [chance.gauss() for _ in range(COLUMNS)]))
                except (OSError, RuntimeError, http.client.HTTPException) as error:
                    self.errors.append(str(error))
                    self._stop.wait(0.2)

    def __enter__(self) -> Self:
        """Start the clients."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let each client finish its request, unless the block was interrupted."""
        self._stop.set()
        if kind is None:
            for thread in self._threads:
                thread.join()
