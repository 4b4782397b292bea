"""The routes: OpenAI's Videos API and what goes beyond it."""

import dataclasses
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from cogvx_fast import __version__

from . import bodies, errors, pictures, references, ui
from .content import content
from .context import Context
from .ending import AnswersAtTheEnd
from .errors import ApiError
from .events import Listening, events
from .files import PREVIEW, REFERENCE, VIDEO
from .jobs import COMPLETED, Job, new_id
from .limits import BodyLimits
from .metrics import metrics
from .orders import Order, Served
from .origins import OwnNames
from .references import BadReferenceError
from .requests_log import RequestsLog
from .retention import remove
from .schemas import Create, Deleted, Model, ModelList, Remix, Upload, Video, VideoList

_POLL_MS = "500"  # what OpenAI's client waits between two looks at a job
_FORMS = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Create"}},
            "multipart/form-data": {"schema": {"$ref": "#/components/schemas/Upload"}},
        },
    }
}
_REMIX = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Remix"}}},
    }
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "An error in OpenAI's body, with `param` and `code`"},
    "5XX": {"description": "Likewise; 503 before a model is warm, 507 where the disk is full"},
}


def _owner(request: Request, authorization: Annotated[str | None, Header()] = None) -> str:
    context: Context = request.app.state.context
    owner = context.owner(authorization)
    if owner:
        request.state.about["key"] = owner
    return owner


WhoAsks = Annotated[str, Depends(_owner)]


def _own_job(request: Request, video_id: str, who: WhoAsks) -> Job:
    context: Context = request.app.state.context
    job = context.job(video_id, who)
    request.state.about["job"] = job.id
    return job


AskedFor = Annotated[Job, Depends(_own_job)]


def build(context: Context) -> FastAPI:
    """The application of a server."""
    app = FastAPI(title="cogvx_fast", version=__version__, description="Videos from text with CogVideoX.")
    app.state.context = context
    # The last one is the outermost: what the limits refuse is said, too.
    app.add_middleware(BodyLimits, max_bytes=context.limits.body_bytes, max_seconds=context.limits.body_seconds)
    if context.own_names_only:
        app.add_middleware(OwnNames)
    app.add_middleware(AnswersAtTheEnd)
    app.add_middleware(RequestsLog)
    errors.add_handlers(app)
    _add_videos(app, context)
    _add_health(app, context)
    ui.mount(app, context)
    make_schema = app.openapi

    def with_bodies() -> dict[str, Any]:
        """FastAPI knows the schemas of bodies that it reads; these are read here."""
        schema = make_schema()
        for model in (Create, Upload, Remix):
            own = model.model_json_schema(ref_template="#/components/schemas/{model}")
            parts = own.pop("$defs", {})
            schema.setdefault("components", {}).setdefault("schemas", {}).update({model.__name__: own, **parts})
        return schema

    app.openapi = with_bodies  # type: ignore[method-assign]  # as FastAPI's documentation has it
    return app


def _add_videos(app: FastAPI, context: Context) -> None:
    listening = Listening(context)

    @app.post("/v1/videos", response_model=Video, responses=_ERRORS, openapi_extra=_FORMS)
    async def create(request: Request, who: WhoAsks) -> Video:
        asked, reference = await bodies.read_create(request)
        video = await run_in_threadpool(_create, context, who, asked, reference)
        request.state.about["job"] = video.id
        return video

    @app.get("/v1/videos", responses=_ERRORS)
    def list_videos(
        who: WhoAsks,
        after: str | None = None,
        limit: Annotated[int, Query(ge=0, le=100)] = 20,
        order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    ) -> VideoList:
        place = None if after is None else context.job(after, who)
        found = context.store.page(who, place, limit + 1, ascending=order == "asc")
        page, prospects = found[:limit], context.prospects()
        return VideoList(
            data=[context.video(job, prospects=prospects) for job in page],
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(found) > limit,
        )

    @app.get("/v1/videos/{video_id}", responses=_ERRORS)
    def retrieve(job: AskedFor, response: Response) -> Video:
        response.headers["openai-poll-after-ms"] = _POLL_MS
        return context.video(job)

    @app.delete("/v1/videos/{video_id}", responses=_ERRORS)
    def delete(job: AskedFor) -> Deleted:
        """A job that runs stops within a step, and leaves nothing."""
        remove(context.store, context.files, job.id)
        return Deleted(id=job.id)

    @app.post("/v1/videos/{video_id}/cancel", responses=_ERRORS)
    def cancel(job: AskedFor) -> Video:
        """It stops within a step. A job that has ended stays as it is."""
        context.store.cancel(job.id)
        return context.video(context.job(job.id, job.owner))

    @app.post("/v1/videos/{video_id}/remix", response_model=Video, responses=_ERRORS, openapi_extra=_REMIX)
    async def remix(request: Request, job: AskedFor) -> Video:
        wanted = bodies.checked(Remix, await bodies.read_json(request))
        video = await run_in_threadpool(_remix, context, job, wanted)
        request.state.about["job"] = video.id
        return video

    @app.get("/v1/videos/{video_id}/content", responses=_ERRORS, response_class=Response)
    def get_content(job: AskedFor, request: Request, variant: str = "video") -> Response:
        return content(context, job, variant, request)

    @app.head("/v1/videos/{video_id}/content", include_in_schema=False)
    def head_content(job: AskedFor, request: Request, variant: str = "video") -> Response:
        return content(context, job, variant, request)

    @app.get("/v1/videos/{video_id}/preview", responses=_ERRORS, response_class=Response)
    def preview(job: AskedFor) -> Response:
        """An animated picture of a job that is being made, a few pixels to a latent."""
        size = context.files.size(job.id, PREVIEW)
        if size is None:
            raise ApiError(404, "there is no picture of it now", "no_preview", "video_id")
        data = b"".join(context.files.pieces(job.id, PREVIEW, 0, size))
        return Response(data, media_type="image/webp", headers={"Cache-Control": "no-store"})

    @app.get("/v1/videos/{video_id}/events", responses=_ERRORS, response_class=StreamingResponse)
    def get_events(job: AskedFor) -> StreamingResponse:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events(listening, job), media_type="text/event-stream", headers=headers)

    @app.get("/v1/models", responses=_ERRORS)
    def list_models(who: WhoAsks) -> ModelList:
        return ModelList(data=[Model(id=name, created=int(context.started_at)) for name in context.models.names])

    @app.get("/v1/models/{model:path}", responses=_ERRORS)
    def get_model(model: str, who: WhoAsks) -> Model:
        if model not in context.models:
            raise ApiError(404, f"model {model[:80]!r} is not served here", "model_not_found", "model")
        return Model(id=model, created=int(context.started_at))


def _add_health(app: FastAPI, context: Context) -> None:
    @app.get("/healthz", response_class=PlainTextResponse)
    def healthz() -> str:
        return "ok\n"

    @app.get("/readyz", responses={503: {"description": "A model is not warm yet"}})
    def readyz() -> JSONResponse:
        warm = context.warm_models()
        ready = all(warm.values())
        body = {"ready": ready, "workers": len(context.workers()), "models": warm}
        return JSONResponse(body, 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def get_metrics() -> Response:
        return Response(metrics(context), media_type="text/plain; version=0.0.4; charset=utf-8")


def _create(context: Context, who: str, asked: dict[str, Any], reference: bytes | None) -> Video:
    priority, count, callback_url = asked.pop("priority"), asked.pop("n"), asked.pop("callback_url", None)
    context.check_priority(who, priority)
    context.check_callback(callback_url)
    if reference is not None:
        asked |= _what_came(context.models.meant(asked), reference)
    order = context.models.order(asked)
    context.check_order(order)
    if reference is not None and "picture" in asked:
        reference = pictures.as_png(reference, order.width, order.height)
    # A video alone has another noise each time; those of one request have seeds behind each other, as it says.
    orders = [dataclasses.replace(order, seed=(order.seed + number) % 2**63) for number in range(count)]
    return _enqueue(context, who, orders, priority, reference, callback_url)


def _what_came(served: Served, reference: bytes) -> dict[str, Any]:
    """What an order has to know of a reference. Raises a BadReferenceError for what the model does not take."""
    words, is_picture = pictures.words_for(reference), pictures.format_of(reference) is not None
    if served.takes_picture and not is_picture:
        raise BadReferenceError(f"is {words}; model {served.name!r} begins with a picture: PNG, JPEG or WebP")
    if is_picture and not served.takes_picture:
        raise BadReferenceError(
            f"is {words}, but model {served.name!r} makes videos of text, or anew of a video, with strength; a picture"
            " takes a server of an image-to-video checkpoint, such as CogVideoX-5b-I2V"
        )
    return {"picture": True} if is_picture else {"reference_frames": references.count_frames(reference)}


def _remix(context: Context, job: Job, wanted: Remix) -> Video:
    if job.status != COMPLETED:
        raise ApiError(409, "only a completed video can be remixed", "not_completed", "video_id")
    context.check_priority(job.owner, wanted.priority)
    context.check_callback(wanted.callback_url)
    before = Order(**job.request)
    names = ("model", "width", "height", "num_frames", "num_inference_steps", "guidance_scale", "seed", "fps")
    asked = {name: getattr(before, name) for name in names} | {"prompt": wanted.prompt}
    asked |= {name: value for name in ("negative_prompt", "scheduler") if (value := getattr(before, name)) is not None}
    asked |= {} if wanted.seed is None else {"seed": wanted.seed}
    reference = None
    strength = before.strength if wanted.strength is None else wanted.strength
    asked |= {} if strength is None else {"strength": strength}
    if context.models.meant(asked).takes_picture:  # as it was fitted for the video before, which had the same size
        reference = _file_of(context, job, REFERENCE)
        asked["picture"] = True
    elif strength is not None:
        reference = _file_of(context, job, REFERENCE if wanted.strength is None else VIDEO)
        asked["reference_frames"] = references.count_frames(reference)
    order = context.models.order(asked)
    context.check_order(order)
    return _enqueue(context, job.owner, [order], wanted.priority, reference, wanted.callback_url, job.id)


def _file_of(context: Context, job: Job, name: str) -> bytes:
    try:
        with context.files.local(job.id, name) as path:
            return path.read_bytes()
    except FileNotFoundError:
        raise ApiError(404, f"the {name.partition('.')[0]} of this video is gone", "not_found", "video_id") from None


def _enqueue(
    context: Context,
    who: str,
    orders: list[Order],
    priority: int,
    reference: bytes | None,
    callback_url: str | None,
    remixed_from: str | None = None,
) -> Video:
    jobs = [
        Job(
            id=new_id(),
            owner=who,
            request=dataclasses.asdict(order),
            model=order.model,
            priority=priority,
            total=order.steps,
            remixed_from=remixed_from,
        )
        for order in orders
    ]
    try:
        if reference is not None:
            data = reference
            for job in jobs:
                context.files.write(job.id, REFERENCE, lambda path: path.write_bytes(data))
        context.add(jobs, callback_url)
    except BaseException:
        for job in jobs:
            context.files.remove(job.id)
        raise
    return context.video(jobs[0], [job.id for job in jobs] if len(jobs) > 1 else None)
