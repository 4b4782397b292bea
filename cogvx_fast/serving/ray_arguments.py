"""What `serve run cogvx_fast.serving.ray_app:build` may be told, and the checks of it; nothing here needs Ray."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cogvx_fast.cli import degrees, loading, validate
from cogvx_fast.cli.checkpoint import read_checkpoint
from cogvx_fast.cli.console import UsageError

from .context import MOST_DAYS, MOST_GIB, MOST_SECONDS, Limits
from .models import check_names, default_name
from .orders import Served
from .settings import Settings


class Arguments(BaseModel):
    """The options of `cogvx-fast serve`, and those of the replicas.

    Attributes:
        model, name: of one model; `models`: of several, as NAME=MODEL,NAME=MODEL.
        folder: of jobs and videos, unless `store` and `files` say otherwise; on several machines it must be shared.
        api_replicas: of the API.
        min_replicas, max_replicas: of each model.
        jobs_per_replica: that have not ended, to which the number of replicas is fitted.
        upscale_seconds, downscale_seconds: for which more or fewer must be wanted.
        gpus_per_replica: 0: it works on a CPU, with as many threads as it has CPUs; of several, which Ray finds on one
            machine, each video is made by all.
        parallel: how several share it out, as `--parallel` of the command; None: "auto".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str | None = None
    name: str | None = None
    models: str | None = None
    folder: Path = Path("cogvx-fast-server")
    store: str | None = None
    files: str | None = None
    engine: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    api_keys_file: Path | None = None
    insecure: bool = False
    max_queue: int = Field(100, ge=1)
    max_work: int | None = Field(None, ge=1)
    keep_days: float = Field(7.0, ge=0, le=MOST_DAYS)
    keep_gib: float = Field(50.0, ge=0, le=MOST_GIB)
    checkpoint_seconds: float = Field(30.0, ge=0, le=MOST_SECONDS)
    lease_seconds: float = Field(30.0, ge=1, le=MOST_SECONDS)
    api_replicas: int = Field(1, ge=1)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    jobs_per_replica: float = Field(1.0, gt=0)
    upscale_seconds: float = Field(10.0, ge=0)
    downscale_seconds: float = Field(300.0, ge=0)
    gpus_per_replica: int = Field(1, ge=0)
    parallel: str | None = None
    cpus_per_replica: int = Field(1, ge=1)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Arguments:
        """The arguments of Ray's command line, which are texts. Raises a UsageError that names what is wrong."""
        unknown = [name for name in given if name not in cls.model_fields]
        if unknown:
            raise UsageError(unknown[0], None, f"is no argument; must be one of {', '.join(cls.model_fields)}")
        try:
            arguments = cls.model_validate(dict(given))
        except ValidationError as error:
            first = error.errors()[0]
            words = first["msg"][0].lower() + first["msg"][1:]
            raise UsageError(str(first["loc"][0]), repr(first["input"]), words) from None
        if arguments.parallel is not None and arguments.gpus_per_replica < 2:
            words = "has no effect on replicas with one device; must go with gpus_per_replica of 2 and more"
            raise UsageError("parallel", repr(arguments.parallel), words)
        if arguments.max_replicas < arguments.min_replicas:
            raise UsageError(
                "max_replicas", arguments.max_replicas, f"must be at least min_replicas, {arguments.min_replicas}"
            )
        if arguments.models is not None and (arguments.model is not None or arguments.name is not None):
            raise UsageError("models", repr(arguments.models), "has names and models; leave out model and name")
        return arguments

    def sources(self) -> dict[str, str]:
        """The models by their names. Raises a UsageError for names that do not tell them apart."""
        if self.models is None:
            source = validate.model_or_demo(self.model)
            found = [(default_name(source) if self.name is None else self.name, source)]
        else:
            found = [(name.strip(), source) for name, _, source in (p.partition("=") for p in self.models.split(","))]
            if not all(source for _, source in found):
                raise UsageError("models", repr(self.models), "must be NAME=MODEL,NAME=MODEL")
        check_names([name for name, _ in found], len(found), "name" if self.models is None else "models")
        return dict(found)

    def served(self) -> list[Served]:
        """The models, from their JSON files alone.

        Of a GPU the memory is not known here unless this machine has one: what does not fit its replica's fails there.
        """
        device, found = "cuda:0" if self.gpus_per_replica else "cpu", []
        for name, source in self.sources().items():
            checkpoint = read_checkpoint(source)
            validate.check_text_only(checkpoint)
            engine = loading.choose_engine(self.engine, None, checkpoint)
            if self.gpus_per_replica > 1:
                degrees.parse(self.parallel, self.gpus_per_replica, checkpoint.variant.num_attention_heads)
            found.append(Served(name, checkpoint, engine, loading.choose_dtype(self.dtype, device, checkpoint), device))
        return found

    def settings(self, served: Served) -> Settings:
        """The settings of the replicas of one of these models."""
        folder = self.folder.absolute()
        return Settings(
            model=self.sources()[served.name],
            name=served.name,
            store=self.store or f"sqlite:///{folder / 'jobs.sqlite'}",
            files=self.files or str(folder / "videos"),
            device=",".join(f"cuda:{number}" for number in range(self.gpus_per_replica)) or served.device,
            parallel=self.parallel,
            dtype=served.dtype,
            engine=self.engine,
            threads=self.cpus_per_replica,
            checkpoint_seconds=self.checkpoint_seconds,
            lease_seconds=self.lease_seconds,
        )

    def limits(self) -> Limits:
        return Limits(
            queued=self.max_queue,
            work=self.max_work,
            max_age=self.keep_days * 86400,
            max_bytes=int(self.keep_gib * 2**30),
        )

    def check_exposed(self, host: str) -> None:
        """Raise a UsageError if others than this machine's own programs would reach the API without a key.

        Args:
            host: at which Ray listens.
        """
        if self.api_keys_file is not None or self.insecure or host == "localhost":
            return
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(host).is_loopback:
                return
        raise UsageError(
            "api_keys_file",
            None,
            f"is missing: Ray listens at {host}, where others may ask; give it, or insecure=true if everybody may",
        )
