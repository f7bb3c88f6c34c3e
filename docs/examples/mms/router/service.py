"""Serve scikit-learn models from S3 with AWS Multi Model Server: one router, many models, as many in memory as fit.

MMS sees one model, this one, and starts as many workers of it as it is told. Each has a ``ModelCache``. Run it from
the folder above::

    MODELCACHE_SOURCE=s3://models/prod multi-model-server --start --foreground --mms-config config.properties

A request names its model in the header ``X-Amzn-SageMaker-Target-Model`` or, without it, in a field ``model`` beside
its ``inputs``. An artifact is ``<model>.tar.gz`` with ``model.joblib`` in it. Environment: ``MODELCACHE_SOURCE``, and
if you like ``MODELCACHE_DISK`` (a folder), ``MODELCACHE_DISK_BUDGET``, ``MODELCACHE_HIGH``, ``MODELCACHE_LOW``,
``MODELCACHE_BUDGET``, ``MODELCACHE_MAX_MODELS``, ``MODELCACHE_TIMEOUT`` (seconds), and ``MODELCACHE_LIMITS``: a JSON
file like ``{"high": "2 GiB"}``, which every worker follows while it runs. boto3 reads credentials, region and
``AWS_ENDPOINT_URL``.
"""

import json
import logging
import os
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

import joblib  # here, not in load: what a loader imports is charged to the first model

from modelcache import (
    AccessDenied,
    CacheClosed,
    ConfigError,
    DiskTier,
    InvalidModelId,
    MemoryTier,
    Missed,
    ModelCache,
    ModelCacheError,
    ModelNotFound,
    SourceUnavailable,
    Timeout,
    sinks,
)

TARGET = "x-amzn-sagemaker-target-model"
LIMITS = ("high", "low", "budget", "max_models")

log = logging.getLogger("modelcache.router")
routers: list["Router"] = []  # one, made in each worker


class Refused(Exception):
    """A request that names no model or brings no rows."""


STATUS: dict[tuple[type[Exception], ...], HTTPStatus] = {
    (Refused, InvalidModelId): HTTPStatus.BAD_REQUEST,
    (ModelNotFound,): HTTPStatus.NOT_FOUND,
    (MemoryError,): HTTPStatus.INSUFFICIENT_STORAGE,  # NoRoom and TooLarge are MemoryErrors
    (SourceUnavailable, AccessDenied, Timeout, CacheClosed): HTTPStatus.SERVICE_UNAVAILABLE,
}


def handle(data: list[dict[str, Any]] | None, context: Any) -> list[Any] | None:
    """Answer a batch of requests; MMS calls it first without data, once in each worker."""
    if data is None:
        routers.append(Router(make_cache(), Limits(os.environ.get("MODELCACHE_LIMITS"))))
        return None
    return [routers[0].answer(request, context, index) for index, request in enumerate(data)]


def load(path: Path) -> Any:
    """Return the model in an unpacked artifact."""
    return joblib.load(path / "model.joblib")


def make_cache() -> ModelCache[Any]:
    """Return the cache that the environment describes; it logs what happens, and is closed when the worker ends."""
    given = {name.removeprefix("MODELCACHE_"): value for name, value in os.environ.items()}
    most = given.get("MAX_MODELS")
    cache = ModelCache(
        given["SOURCE"],
        load,
        disk=DiskTier(given.get("DISK"), budget=given.get("DISK_BUDGET")),
        memory=MemoryTier(
            high=given.get("HIGH", "80%"),
            low=given.get("LOW"),
            budget=given.get("BUDGET"),
            max_models=int(most) if most else None,
        ),
        timeout=float(given.get("TIMEOUT", "30")),
    )
    sinks.log(cache)  # MMS sends what a worker logs to its own log
    return cache


class Limits:
    """Memory limits in a JSON file: with several workers behind one port, no request could reach each of them.

    Args:
        path: the file's. None: there is none, as there may be none at this path.
    """

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else None
        self._seen: tuple[int, ...] = ()

    def apply(self, memory: MemoryTier) -> None:
        """Retune the memory tier if the file has changed: what must go has gone when this returns."""
        try:
            if self._path is not None and self._changed(self._path):
                retune(memory, json.loads(self._path.read_bytes()))
                log.info("limits are now %s", {name: getattr(memory, name) for name in LIMITS})
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:  # half written, say: the next change is looked at again
            log.warning("limits in %s: %s", self._path, error)

    def _changed(self, path: Path) -> bool:
        found, before = path.stat(), self._seen
        self._seen = (found.st_ino, found.st_mtime_ns, found.st_size)
        return self._seen != before


def retune(memory: MemoryTier, wanted: Any) -> None:
    """Set the limits that are named, all or none; what is not named stays as it is.

    Raises:
        ConfigError: one of them can't work.
    """
    if not isinstance(wanted, dict):
        raise ConfigError('no JSON object like {"high": "2 GiB"}')
    if unknown := sorted(wanted.keys() - set(LIMITS)):
        raise ConfigError(f"{unknown[0]!r:.100} is not one of {', '.join(LIMITS)}")
    MemoryTier(**wanted)  # refuses what can't work before anything has changed
    if {"high", "low"} <= wanted.keys():
        memory.low = None  # follows high: so a pair below, or above, the present one may come in this order
    for name in LIMITS:
        if name in wanted:
            setattr(memory, name, wanted[name])


class Router:
    """All models behind one handler, in one worker, which MMS gives one batch at a time.

    Args:
        cache: where the models are.
        limits: what the cache's memory tier follows.
    """

    def __init__(self, cache: ModelCache[Any], limits: Limits) -> None:
        self._cache = cache
        self._limits = limits
        self._missed = False
        cache.on(Missed, self._note)

    def _note(self, _: Missed) -> None:
        self._missed = True  # a callback runs on the thread that caused the event: the one that answers

    def answer(self, request: dict[str, Any], context: Any, index: int) -> dict[str, Any]:
        """Return what one request of a batch asks for, or why not.

        An error is an answer with a status, never an exception: for one exception MMS fails the whole batch, logs a
        traceback, and tells the client of an ``InternalServerException``.
        """
        context.set_response_content_type(index, "application/json")
        try:
            self._limits.apply(self._cache.memory)
            model, rows = parse(request, context.get_all_request_header(index))
            return {"model": model, "outputs": self._predict(model, rows, context.metrics, index)}
        except Exception as error:
            status = next((status for kinds, status in STATUS.items() if isinstance(error, kinds)), None)
            if status is None and not isinstance(error, ModelCacheError):  # what the cache raises it has logged
                log.exception("the prediction failed")
            status = status or HTTPStatus.INTERNAL_SERVER_ERROR
            context.set_response_status(status.value, status.phrase, index)
            return {"error": type(error).__name__, "message": str(error)}

    def _predict(self, model: str, rows: list[Any], metrics: Any, index: int) -> list[float]:
        self._missed, asked = False, time.perf_counter()
        with self._cache.lease(model) as estimator:  # stays in memory until the block ends
            waited = (time.perf_counter() - asked) * 1000
            metrics.add_counter("ModelCacheHit", 0 if self._missed else 1, index)  # SageMaker's names
            metrics.add_time("ModelLoadingWaitTime", round(waited, 3), index)
            return [float(output) for output in estimator.predict(rows)]


def parse(request: dict[str, Any], headers: dict[str, Any]) -> tuple[str, list[Any]]:
    """Return the model that a request is for, and its rows.

    Raises:
        Refused: there is no such thing in it.
    """
    if "body" not in request:  # curl -d alone announces a form, which MMS takes apart
        raise Refused("no body: send it with Content-Type: application/json")
    body = request["body"]
    try:
        body = body if isinstance(body, dict) else json.loads(body)  # a dict: with decode_input_request=true
    except ValueError as error:
        raise Refused(f"the body is no JSON: {error}") from None
    rows = body.get("inputs") if isinstance(body, dict) else None
    if not isinstance(rows, list):
        raise Refused('send {"inputs": [row, ...]}')
    # MMS hands headers on in the case in which they were sent.
    model = next((value for name, value in headers.items() if name.lower() == TARGET), body.get("model"))
    if not isinstance(model, str):
        raise Refused('name a model: header X-Amzn-SageMaker-Target-Model, or {"model": ..., "inputs": ...}')
    return model, rows
