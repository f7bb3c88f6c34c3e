"""Serve scikit-learn models from S3 with Flask: one process, many models, as many in memory as fit.

Run it::

    MODELCACHE_SOURCE=s3://models/prod gunicorn --worker-class gthread --workers 2 --threads 8 'flask_app:create_app()'

An artifact is ``<model>.tar.gz`` with ``model.joblib`` in it. Environment: ``MODELCACHE_SOURCE``, and if you like
``MODELCACHE_DISK`` (a folder), ``MODELCACHE_DISK_BUDGET``, ``MODELCACHE_HIGH``, ``MODELCACHE_LOW``,
``MODELCACHE_BUDGET``, ``MODELCACHE_MAX_MODELS``, ``MODELCACHE_LOADERS``, ``MODELCACHE_TIMEOUT`` (seconds). boto3
reads credentials, region and ``AWS_ENDPOINT_URL``. Each worker has its own memory tier and answers ``/models``,
``/stats``, ``/events`` and ``/memory`` for itself; let only operators reach these.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import joblib  # here, not in load: what a loader imports is charged to the first model
from flask import Flask, Response, abort, g, request

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
    NoRoom,
    SourceUnavailable,
    Timeout,
    TooLarge,
    sinks,
)

STATUS = {
    (InvalidModelId, ConfigError): 400,
    (ModelNotFound,): 404,
    (NoRoom, TooLarge): 507,
    (SourceUnavailable, AccessDenied, Timeout, CacheClosed): 503,
}


def load(path: Path) -> Any:
    """Return the model in an unpacked artifact."""
    return joblib.load(path / "model.joblib")


def make_cache() -> ModelCache[Any]:
    """Return the cache that the environment describes; it starts no thread, so a worker may be forked after it."""
    given = {name.removeprefix("MODELCACHE_"): value for name, value in os.environ.items()}
    most = given.get("MAX_MODELS")
    return ModelCache(
        given["SOURCE"],
        load,
        disk=DiskTier(given.get("DISK"), budget=given.get("DISK_BUDGET")),
        memory=MemoryTier(
            high=given.get("HIGH", "80%"),
            low=given.get("LOW"),
            budget=given.get("BUDGET"),
            max_models=int(most) if most else None,
        ),
        loaders=int(given.get("LOADERS", "4")),
        timeout=float(given.get("TIMEOUT", "30")),
    )


def inputs() -> list[Any]:
    """Return the rows that the request brings as ``{"inputs": [...]}``."""
    body = request.get_json()
    rows = body.get("inputs") if isinstance(body, dict) else None
    return rows if isinstance(rows, list) else abort(400, 'send {"inputs": [row, ...]}')


def create_app() -> Flask:
    """Return the application; its cache is closed when the process ends."""
    app = Flask(__name__)
    app.logger.setLevel(logging.INFO)
    cache = app.extensions["modelcache"] = make_cache()
    sinks.log(cache, logger=app.logger)
    add_predictions(app, cache)
    add_operations(app, cache)

    @app.errorhandler(ModelCacheError)
    def refuse(error: ModelCacheError) -> tuple[dict[str, Any], int, dict[str, str]]:
        status = next((status for kinds, status in STATUS.items() if isinstance(error, kinds)), 500)
        later = {"Retry-After": "5"} if status == 503 else {}  # noqa: PLR2004 - HTTP
        return {"error": type(error).__name__, "message": str(error)}, status, later

    return app


def add_predictions(app: Flask, cache: ModelCache[Any]) -> None:
    """Add what clients ask for."""

    @app.post("/models/<path:model>/predict")
    def predict(model: str) -> tuple[dict[str, Any], dict[str, str]]:
        rows, asked = inputs(), time.perf_counter()
        with cache.lease(model) as estimator:  # stays in memory until the block ends
            waited = (time.perf_counter() - asked) * 1000
            outputs = [float(output) for output in estimator.predict(rows)]
        found = "miss" if "missed" in g else "hit"
        return {"model": model, "outputs": outputs}, {"Server-Timing": f"cache;desc={found};dur={waited:.3f}"}

    @app.post("/models/<path:model>/stream")
    def stream(model: str) -> Response:
        rows = inputs()
        lease = g.lease = cache.lease(model)
        estimator = lease.acquire()

        def lines() -> Iterator[str]:
            for row in rows:
                yield json.dumps(float(estimator.predict([row])[0])) + "\n"

        response = Response(lines(), mimetype="application/x-ndjson")
        response.call_on_close(lease.release)  # after the last line, or when the client is gone
        del g.lease  # from here on the response has it
        return response

    @app.teardown_appcontext
    def release(_: BaseException | None) -> None:
        """Release a lease that no response took over: Flask comes here *before* a stream is sent."""
        if "lease" in g:
            g.lease.release()

    @cache.on(Missed)
    def note(_: Missed) -> None:
        g.missed = True  # a callback runs on the thread that caused the event: this request's


def add_operations(app: Flask, cache: ModelCache[Any]) -> None:
    """Add what operators ask for: what is where, what happened and why, and other limits."""

    @app.get("/models")
    def models() -> list[dict[str, Any]]:
        return [attrs.asdict(row) for row in cache.models()]

    @app.get("/stats")
    def stats() -> dict[str, Any]:
        figures = cache.stats()
        return attrs.asdict(figures) | {"hit_ratio": figures.hit_ratio, "pid": os.getpid()}

    @app.get("/events")
    def events() -> list[dict[str, Any]]:
        since = request.args.get("since", 0, type=int)
        return [event.to_dict() for event in cache.history() if event.seq > since]

    @app.patch("/memory")
    def memory() -> dict[str, Any]:
        """Retune the running cache: what must go has gone when this answers."""
        wanted, names = request.get_json(), ("high", "low", "budget", "max_models")
        if not isinstance(wanted, dict) or (wanted.keys() - set(names)):
            abort(400, f"send some of {', '.join(names)}")
        MemoryTier(**wanted)  # refuses what can't work before anything has changed
        if {"high", "low"} <= wanted.keys():
            cache.memory.low = None  # follows high: so a pair below, or above, the present one may come in this order
        for name in names:
            if name in wanted:
                setattr(cache.memory, name, wanted[name])
        return {name: getattr(cache.memory, name) for name in names}
