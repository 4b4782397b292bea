"""A worker in this process, with the demo model."""

import contextlib
import dataclasses
import errno
import inspect
import random
import time

import numpy as np
import pytest
import torch
from PIL import Image

from cogvx_fast import FastCogVideoXPipeline, demo_checkpoint, threads
from cogvx_fast.resume import Parked
from cogvx_fast.serving import making, progress, references
from cogvx_fast.serving import worker as worker_module
from cogvx_fast.serving.files import PARKED, PREVIEW, REFERENCE, VIDEO
from cogvx_fast.serving.jobs import StorageFullError
from cogvx_fast.serving.making import TextCache
from cogvx_fast.serving.store import Store
from cogvx_fast.serving.worker import Worker
from cogvx_fast.video import write_video
from tests.serving.conftest import ORDER, SMALL


def bytes_of(files, job):
    size = files.size(job.id, VIDEO)
    return None if size is None else b"".join(files.pieces(job.id, VIDEO, 0, size))


@pytest.fixture(scope="session")
def expected(maker, tmp_path_factory):
    """The file that the pipeline alone makes of an order."""

    def make(order):
        pipe = FastCogVideoXPipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        if order.scheduler == "dpm":
            pipe.scheduler = making.loading.make_scheduler("dpm", pipe.scheduler)
        with threads.fixed(torch.get_num_threads()):
            latents = pipe(
                order.prompt,
                negative_prompt=order.negative_prompt,
                height=order.height,
                width=order.width,
                num_frames=order.num_frames,
                num_inference_steps=order.num_inference_steps,
                guidance_scale=order.guidance_scale,
                generator=torch.Generator().manual_seed(order.seed),
                output_type="latent",
            ).frames
            chunks = list(pipe.decode_stream(latents, order.num_frames))
        images = [i for c in chunks for i in pipe.video_processor.postprocess_video(c, output_type="pil")[0]]
        path = tmp_path_factory.mktemp("expected") / "video.mp4"
        return write_video(images, path, order.fps, repeatable=True).read_bytes()

    return make


def test_it_makes_what_the_pipeline_makes(work, add, store, files, expected):
    plain = add(), ORDER
    values = {"negative_prompt": "a dog", "scheduler": "dpm", "seed": 3, "num_frames": 9, "fps": 10, "width": 48}
    other = add(**values), dataclasses.replace(ORDER, **values)
    work()
    for job, order in (plain, other):
        done = store.get(job.id)
        assert (done.status, done.done, done.total) == ("completed", 4, 4), done.error_message
        assert done.bytes == files.size(job.id, VIDEO) == files.sizes(job.id), "nothing else is left"
        assert set(done.result["stage_seconds"]) == {"text", "denoise", "decode", "write"}
        assert all(seconds >= 0 for seconds in done.result["stage_seconds"].values())
        assert done.result["made_steps"] == 4 and "engine: exact" in done.result["engine_report"]
        assert done.result["warnings"] == [] and done.busy_seconds > 0
        assert bytes_of(files, job) == expected(order)
    assert store.totals()["completed"] == 2 and store.totals()["steps"] == 8
    assert store.workers(60) == {}, "it said that it is gone"


def test_the_warm_up_says_how_long_the_first_job_takes(work, add, store, place, maker):
    worker, said = Worker(place), []
    worker._store.seen = lambda _, about: said.append(dict(about))
    work(until=lambda: True, worker=worker)
    (warm,) = [about["warm"] for about in said if about["ready"]][:1]
    assert warm["made_steps"] == 1 and set(warm["stage_seconds"]) == {"denoise", "decode"}
    assert all(0 < seconds < 60 for seconds in warm["stage_seconds"].values())
    expected = worker._candidate(add(num_inference_steps=4)).expected
    size = 64 * 64 * 17 / (warm["request"]["width"] * warm["request"]["height"] * warm["request"]["num_frames"])
    assert expected == pytest.approx(size * (4 * warm["stage_seconds"]["denoise"] + warm["stage_seconds"]["decode"]))


def test_a_worker_that_is_told_to_end_parks_and_another_goes_on(work, add, store, files, expected):
    job = add(num_inference_steps=24, scheduler="dpm", **SMALL)
    parked_at = []
    while store.get(job.id).status != "completed":
        before = store.get(job.id).done
        work(until=lambda before=before: store.get(job.id).done > before + 5 or store.get(job.id).ended)
        there = store.get(job.id)
        if not there.ended:
            assert (there.status, there.lease, there.kills) == ("queued", None, 0)
            with files.local(job.id, PARKED) as path:
                parked_at.append(Parked.load(path).done)
            assert there.done == parked_at[-1]
    assert parked_at and parked_at == sorted(set(parked_at))
    assert store.get(job.id).result["made_steps"] == 24, "no step was made twice"
    assert bytes_of(files, job) == expected(
        dataclasses.replace(ORDER, num_inference_steps=24, scheduler="dpm", **SMALL)
    )


def test_a_short_job_parks_a_long_one_which_goes_on_to_the_same_bits(work, add, store, files, expected):
    long = add(num_inference_steps=60, **SMALL)
    short = []

    def until():
        if not short and store.get(long.id).done >= 5:
            short.append(add(num_inference_steps=2, **SMALL))
        return bool(short) and not store.queue_length()

    work(until)
    first, second = store.get(short[0].id), store.get(long.id)
    assert first.status == second.status == "completed"
    assert first.completed_at < second.completed_at
    assert second.result["made_steps"] == 60 and second.kills == 0
    assert bytes_of(files, long) == expected(dataclasses.replace(ORDER, num_inference_steps=60, **SMALL))
    assert bytes_of(files, short[0]) == expected(dataclasses.replace(ORDER, num_inference_steps=2, **SMALL))


def test_cancelling_ends_it_within_a_step(work, add, store, files):
    job, next_one = add(num_inference_steps=900, **SMALL), add()
    done = []

    def until():
        if not done and store.get(job.id).done >= 3:
            store.cancel(job.id)
            done.append(store.get(job.id).done)
        return not store.queue_length()

    work(until)
    there = store.get(job.id)
    assert (there.status, there.error_code) == ("failed", "cancelled")
    assert there.done <= done[0] + 1
    assert files.sizes(job.id) == 0
    assert store.get(next_one.id).status == "completed", "the worker goes on"


def test_a_job_that_is_deleted_leaves_nothing(work, add, store, files):
    job = add(num_inference_steps=900, **SMALL)

    def until():
        if store.get(job.id) is not None and store.get(job.id).done >= 3:
            store.delete(job.id)
            files.remove(job.id)
        return not store.queue_length()

    work(until)
    assert files.job_ids() == set()


def test_a_lost_lease_stops_it_and_harms_no_other(work, add, store, files, place):
    job = add(num_inference_steps=900, **SMALL)
    taken = []

    def until():
        if not taken and store.get(job.id).done >= 3:
            store.reap(store.get(job.id).worker)
            taken.append(store.take(job.id, "another", 60))
            taken.append(store.get(job.id).done)
        return bool(taken)

    work(until)
    there = store.get(job.id)
    assert (there.status, there.worker, there.lease, there.done) == ("in_progress", "another", *taken)
    assert files.size(job.id, PARKED) is not None, "the other goes on from it"


def test_who_loses_a_lease_while_it_writes_leaves_no_video(work, add, store, files, monkeypatch):
    job, write = add(num_inference_steps=2, **SMALL), progress.write_video

    def write_and_lose_it(*arguments, **options):
        write(*arguments, **options)
        store.reap(store.get(job.id).worker)
        store.take(job.id, "another", 60)

    monkeypatch.setattr(progress, "write_video", write_and_lose_it)
    work(until=lambda: store.get(job.id).worker == "another")
    there = store.get(job.id)
    assert (there.status, there.worker, there.result) == ("in_progress", "another", {})
    assert files.size(job.id, VIDEO) is None, "it is the other's to write"


def test_a_reference_video_is_made_anew(work, add, store, files, maker):
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (17, 6, 10, 3)).astype(np.uint8)
    job = add(num_inference_steps=20, strength=0.5)
    images = [Image.fromarray(frame).resize((100, 60)) for frame in noise]
    files.write(job.id, REFERENCE, lambda path: write_video(images, path.with_suffix(".mp4"), 8).rename(path))
    with files.local(job.id, REFERENCE) as path:
        frames = references.frames(path, 64, 64, 17)
    assert store.get(job.id).total == 10
    work(until=lambda: store.get(job.id).done >= 3)  # parked on the way
    assert store.get(job.id).status == "queued"
    work()
    assert store.get(job.id).status == "completed", store.get(job.id).error_message
    pipe = maker._video_to_video
    with threads.fixed(torch.get_num_threads()):
        whole = pipe(
            video=frames,
            prompt=ORDER.prompt,
            strength=0.5,
            height=64,
            width=64,
            num_inference_steps=20,
            guidance_scale=1.5,
            generator=torch.Generator().manual_seed(0),
        ).frames[0]
    with files.local(job.id, VIDEO) as path:
        made = references.frames(path)
    difference = np.abs(np.stack([np.asarray(a, np.float32) - np.asarray(b) for a, b in zip(made, whole, strict=True)]))
    assert difference.mean() < 6, "of the video's compression"


def test_previews_are_shown_on_the_way(work, add, store, files, monkeypatch, maker):
    class Map:
        def frames(self, latents):
            return torch.zeros(*latents.shape[:2], *latents.shape[3:], 3, dtype=torch.uint8)

    monkeypatch.setattr(maker, "_preview", Map())
    job, seen = add(num_inference_steps=20), []

    def until():
        with_preview = files.size(job.id, PREVIEW)
        if with_preview and not seen:
            with files.local(job.id, PREVIEW) as path:
                seen.append(Image.open(path).size)
        return not store.queue_length()

    work(until)
    assert seen == [(128, 128)]
    assert files.size(job.id, PREVIEW) is None


def test_what_cannot_be_made_fails_with_a_reason(work, add, store, monkeypatch, maker):
    def fail(*_, **__):
        raise error

    job = add()
    error = ValueError("the latents are not finite")
    monkeypatch.setattr(maker.pipe, "decode_stream", fail)
    work()
    there = store.get(job.id)
    assert (there.status, there.error_code) == ("failed", "generation_failed")
    assert "not finite" in there.error_message
    error = torch.OutOfMemoryError("CUDA out of memory")
    job = add()
    work()
    assert store.get(job.id).error_code == "out_of_memory"
    error = RuntimeError("/secret/path")
    job = add()
    with pytest.raises(RuntimeError):
        work()
    assert store.get(job.id).error_code == "internal_error"
    assert "secret" not in store.get(job.id).error_message


def test_a_full_disk_loses_no_job(work, add, store, files, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    job = add(num_inference_steps=6)
    with monkeypatch.context() as patch:
        patch.setattr(progress, "write_video", full)
        work(until=lambda: store.get(job.id).not_before > 0)
    there = store.get(job.id)
    assert (there.status, there.kills) == ("queued", 0) and there.not_before > time.time() + 5
    with files.local(job.id, PARKED) as path:
        assert Parked.load(path).done == 6, "only decoding is left"


def test_a_database_without_room_kills_no_worker(work, add, store, monkeypatch):
    """One write of five finds it full: when a job is taken, at a step, when it is given back, at its end."""
    writing, chance, refused = Store._writing, random.Random(1), []

    @contextlib.contextmanager
    def full(self):
        if chance.random() < 0.2:
            refused.append(inspect.stack()[2].function)
            raise StorageFullError("there is no room for the jobs' database")
        with writing(self) as connection:
            yield connection

    monkeypatch.setattr(worker_module, "_FULL_SECONDS", 0.01)
    monkeypatch.setattr(worker_module, "_RETRY_SECONDS", 0.01)
    jobs = [add(num_inference_steps=steps, **SMALL) for steps in (2, 3, 4)]
    monkeypatch.setattr(Store, "_writing", full)
    work()
    assert {"take", "report", "_end_lease"} <= set(refused), refused
    for job in jobs:
        there = store.get(job.id)
        assert (there.status, there.kills) == ("completed", 0), there.error_message


def test_texts_are_encoded_once():
    texts = []
    cache = TextCache(lambda text: texts.append(text) or torch.tensor(len(texts)), size=2)
    for text in ("a", "", "b", "a", "c", "a", "b", ""):
        cache.get(text)
    assert texts == ["", "a", "b", "c", "b"]


def test_a_prompt_that_is_cut_is_said_to_be(work, add, store):
    job = add(prompt="a red circle " * 200)
    work()
    (warning,) = store.get(job.id).result["warnings"]
    assert warning.startswith("prompt is longer than the model's 226 tokens") and "red circle" in warning


def test_a_step_that_takes_too_long_is_not_waited_for(place, add, store, monkeypatch):
    job, ended = add(), []
    monkeypatch.setattr("os._exit", lambda code: ended.append(code))
    worker = Worker(dataclasses.replace(place, drain_seconds=0.05))
    worker._current = job, store.take(job.id, worker.id, 60)
    worker.end()
    while not ended:
        time.sleep(0.01)
    assert ended == [0] and store.get(job.id).status == "queued" and store.get(job.id).kills == 0
    assert Store(place.store).workers(60) == {}
