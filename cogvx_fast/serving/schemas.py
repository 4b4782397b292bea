"""What requests and answers of the API hold: OpenAI's Videos API, and what goes beyond it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .jobs import COMPLETED, Job
from .keys import PRIORITIES
from .orders import Order

MAX_CLIPS = 16
_LARGE = 2**63 - 1


def _as_text(value: Any) -> Any:
    """OpenAI's seconds are strings; a number is one that was meant to be."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else value


Whole = Annotated[int, Field(ge=-_LARGE, le=_LARGE)]


class InputReference(BaseModel):
    """A video, or a picture for a model that begins with one, in a data URL; nothing is fetched from an address."""

    model_config = ConfigDict(extra="forbid")
    image_url: str | None = None
    video_url: str | None = None


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid")
    prompt: str
    negative_prompt: str | None = None
    model: str | None = None
    seconds: Annotated[str, BeforeValidator(_as_text)] | None = Field(None, description='such as "4"')
    size: str | None = Field(None, description="WIDTHxHEIGHT")
    width: Whole | None = None
    height: Whole | None = None
    num_frames: Whole | None = None
    fps: Whole | None = None
    num_inference_steps: Whole | None = None
    guidance_scale: float | None = None
    seed: Whole | None = None
    engine: str | None = None
    scheduler: str | None = None
    strength: float | None = Field(None, description="how much of the reference is made anew, 0 to 1")
    priority: int = Field(0, ge=PRIORITIES[0], le=PRIORITIES[-1])
    callback_url: str | None = Field(None, description="told of the end, if the server's list has its host")
    n: int = Field(1, ge=1, le=MAX_CLIPS, description="videos, of this seed and the ones behind it")


class Create(_Parameters):
    """A request as JSON."""

    input_reference: InputReference | None = None


class Upload(_Parameters):
    """A request as a form."""

    input_reference: bytes | None = Field(None, json_schema_extra={"format": "binary"})


class Remix(BaseModel):
    """The video again with another prompt: from the same noise, or, with a strength, from the video itself."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    strength: float | None = None
    seed: Whole | None = None
    priority: int = Field(0, ge=PRIORITIES[0], le=PRIORITIES[-1])
    callback_url: str | None = None


class JobError(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """A job. What stands behind `error` is beyond OpenAI's."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str | None
    size: str
    seconds: str
    remixed_from_video_id: str | None
    error: JobError | None
    negative_prompt: str | None
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    engine: str
    scheduler: str | None
    strength: float | None
    priority: int
    steps_done: int
    queue_position: int | None
    eta_seconds: float | None
    stage_seconds: dict[str, float] | None
    engine_report: str | None
    warnings: list[str]
    videos: list[str] | None = Field(None, description="the ids of all, of a request for several")

    @classmethod
    def of(
        cls,
        job: Job,
        max_age: float,
        position: int | None = None,
        eta: float | None = None,
        ids: list[str] | None = None,
    ) -> Video:
        """The answer about a job as it is now; it is kept for `max_age` seconds."""
        order = Order(**job.request)
        ended_at = job.completed_at if job.ended else None
        # Decoding is still to come when all steps are done.
        progress = 100 if job.status == COMPLETED else min(99, 100 * job.done // max(1, job.total))
        return cls(
            id=job.id,
            status=job.status,  # type: ignore[arg-type]  # one of these
            progress=progress,
            created_at=int(job.created_at),
            completed_at=None if ended_at is None else int(ended_at),
            expires_at=None if ended_at is None else int(ended_at + max_age),
            size=f"{order.width}x{order.height}",
            seconds=f"{(order.num_frames - 1) / order.fps:g}",
            remixed_from_video_id=job.remixed_from,
            error=None if job.error_code is None else JobError(code=job.error_code, message=job.error_message or ""),
            priority=job.priority,
            steps_done=job.done,
            queue_position=position,
            eta_seconds=None if eta is None else round(eta, 3),
            stage_seconds=job.result.get("stage_seconds"),
            engine_report=job.result.get("engine_report"),
            warnings=job.result.get("warnings", []),
            videos=ids,
            **{name: value for name, value in job.request.items() if name in cls.model_fields},
        )


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "cogvx_fast"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
