"""The server as an application of Ray Serve, for more than one machine:

    serve run cogvx_fast.serving.ray_app:build model=THUDM/CogVideoX-2b store=postgresql://… files=s3://…

The API is one deployment, every model one more, whose replicas are workers: they take jobs from the store as those of
`cogvx-fast serve` do. Ray places them, starts them again when they die, and sends requests to the API.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.context import _get_global_client
from ray.serve.deployment import Application

from . import api
from .context import Context
from .files import Files
from .keys import Keys
from .logs import logger, set_up
from .models import Models
from .orders import Served
from .ray_arguments import Arguments
from .ray_scaling import QueueDepth
from .server import sweep
from .settings import Settings
from .store import Store
from .worker import Worker

_ALIVE_SECONDS = 10.0


def build(args: Mapping[str, Any]) -> Application:
    """The application, by the arguments of `Arguments`.

    Raises:
        UsageError: for what cannot work, before anything is started.
    """
    arguments = Arguments.of(args)
    served = arguments.served()
    if arguments.store is None or arguments.files is None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    workers = [_deployment(arguments, one, number).bind(arguments.settings(one)) for number, one in enumerate(served)]
    # Open answers, such as streams of events, have so long to end.
    options: dict[str, Any] = {"name": "api", "graceful_shutdown_timeout_s": 5, "max_ongoing_requests": 1000}
    options["num_replicas"] = arguments.api_replicas
    return serve.deployment(serve.ingress(_api(arguments, served))(), **options).bind(*workers)


def _deployment(arguments: Arguments, served: Served, number: int) -> serve.Deployment:
    """Of a model's workers."""
    settings = arguments.settings(served)
    if arguments.min_replicas == arguments.max_replicas:
        count: dict[str, Any] = {"num_replicas": arguments.min_replicas}
    else:
        kwargs = {"store": settings.store, "model": served.name, "jobs_per_replica": arguments.jobs_per_replica}
        config = AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=arguments.max_replicas,
            upscale_delay_s=arguments.upscale_seconds,
            downscale_delay_s=arguments.downscale_seconds,
            policy=AutoscalingPolicy(policy_function=QueueDepth, policy_kwargs=kwargs),
        )
        count = {"autoscaling_config": config}
    needs = {"num_gpus": arguments.gpus_per_replica, "num_cpus": arguments.cpus_per_replica}
    name = f"model-{number}-{re.sub(r'[^A-Za-z0-9.-]+', '-', served.name)}"
    return serve.deployment(Replica, name=name, ray_actor_options=needs, **count)


def _api(arguments: Arguments, served: list[Served]) -> Callable[[], FastAPI]:
    """What makes the application of the API, where it is to run."""

    def make() -> FastAPI:
        set_up()
        arguments.check_exposed(_get_global_client().http_config.host)
        settings, limits = arguments.settings(served[0]), arguments.limits()
        context = Context(
            models=Models(served),
            store=Store(settings.store),
            files=Files(settings.files, limits.least_free),
            keys=None if arguments.api_keys_file is None else Keys(arguments.api_keys_file),
            limits=limits,
            settings=settings,
        )
        for model, count in context.unserved().items():
            logger.warning("%d jobs wait for model %r, which is not served", count, model)
        threading.Thread(target=sweep, args=(context,), daemon=True).start()
        return api.build(context)

    return make


class Replica:
    """A worker in a thread of its own; it is there when its model is warm.

    When Ray stops it, it parks what it makes, and another goes on with it. When it dies, its lease runs out.
    """

    def __init__(self, settings: Settings) -> None:
        set_up()
        self._worker = Worker(settings)
        self._failed: BaseException | None = None
        self._is_warm = False
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()
        store = Store(settings.store, durable=False)
        while not store.workers(_ALIVE_SECONDS).get(self._worker.id, {}).get("ready"):
            self.check_health()
            time.sleep(0.1)
        self._is_warm = True
        store.close()

    def _work(self) -> None:
        try:
            self._worker.run()
        except BaseException as error:
            logger.exception("a worker ended", extra={"worker": self._worker.id})
            self._failed = error
            if self._is_warm:  # nothing may say any more that it lives; Ray starts another
                os._exit(1)

    def check_health(self) -> None:
        """Called by Ray. Raises a RuntimeError if the worker has ended."""
        if not self._thread.is_alive():
            raise RuntimeError(f"the worker ended: {self._failed}") from self._failed

    def __del__(self) -> None:
        """Called by Ray before it ends the process."""
        if hasattr(self, "_thread"):
            self._worker.end()
            self._thread.join()
