"""Pictures that come with a request: decoded, refused, ordered, and made into the same video also after a kill."""

import base64
import dataclasses
import struct
import threading
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image, ImageOps

from cogvx_fast import FastCogVideoXImageToVideoPipeline, threads
from cogvx_fast.cli.console import UsageError
from cogvx_fast.serving import pictures
from cogvx_fast.serving.api import build
from cogvx_fast.serving.context import Context, Limits
from cogvx_fast.serving.files import REFERENCE, VIDEO, Files
from cogvx_fast.serving.making import Maker
from cogvx_fast.serving.models import Models
from cogvx_fast.serving.orders import Served
from cogvx_fast.serving.references import BadReferenceError
from cogvx_fast.serving.settings import Settings
from cogvx_fast.serving.store import Store
from cogvx_fast.serving.worker import Worker
from cogvx_fast.video import write_video
from tests import toy
from tests.serving.process import Server

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def as_pixels(data, width=60, height=40):
    with Image.open(BytesIO(pictures.as_png(data, width, height))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (width, height))
        return np.asarray(image)


RED = Image.new("RGB", (60, 40), (200, 10, 10))


def test_a_picture_of_the_right_size_stays_as_it_is():
    data = encoded(Image.fromarray(PIXELS))
    assert np.array_equal(as_pixels(data), PIXELS)
    assert np.array_equal(as_pixels(pictures.as_png(data, 60, 40)), PIXELS), "also a second time"


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_the_other_formats(kind):
    data = encoded(RED, kind, quality=95)
    assert pictures.format_of(data) == kind
    assert np.abs(as_pixels(data).astype(int) - (200, 10, 10)).max() < 8


def test_it_is_scaled_and_cut_in_the_middle():
    wide = Image.new("RGB", (300, 40), "black")
    wide.paste((255, 255, 255), (140, 0, 160, 40))
    seen = as_pixels(encoded(wide), 40, 40)
    assert seen[:, 12:28].min() > 250 and seen[:, :8].max() < 5 and seen[:, -8:].max() < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_as_its_camera_says(orientation):
    image = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = image.resize((60, 40))
    expected = ImageOps.exif_transpose(Image.open(BytesIO(encoded(image, exif=exif))))
    assert expected.size == ((40, 60) if orientation > 4 else (60, 40))
    assert np.array_equal(as_pixels(encoded(image, exif=exif), *expected.size), np.asarray(expected))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_shines_through_is_white(mode):
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 30, 40))
    if mode == "P":
        data = encoded(Image.new("P", (60, 40), 0), transparency=0)
        assert as_pixels(data).min() == 255
        return
    seen = as_pixels(encoded(image.convert(mode)))
    assert seen[:, :30].max() == 0 and seen[:, 30:].min() == 255
    half = Image.new("RGBA", (60, 40), (0, 0, 0, 128))
    assert np.abs(as_pixels(encoded(half)).astype(int) - 127).max() <= 1


def test_inks_and_sixteen_bits_are_converted():
    cmyk = encoded(Image.new("CMYK", (60, 40), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(as_pixels(cmyk).astype(int) - (255, 0, 0)).max() < 8
    ramp = np.linspace(0, 65535, 60).astype(np.uint16)[None].repeat(40, 0)
    seen = as_pixels(encoded(Image.fromarray(ramp)))
    assert np.array_equal(seen, (ramp >> 8).astype(np.uint8)[..., None].repeat(3, -1))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_it_is_the_first_frame(kind):
    data = encoded(RED, kind, save_all=True, append_images=[Image.new("RGB", (60, 40), "blue")], duration=100)
    assert np.abs(as_pixels(data).astype(int) - (200, 10, 10)).max() < 8


def png_that_says(width, height):
    """A PNG whose head promises so many pixels, with none behind it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(7100, 7100), (60_000, 60_000)])
def test_a_bomb_is_refused_before_it_is_decoded(width, height, monkeypatch):
    monkeypatch.setattr("cogvx_fast.pictures._of_eight_bits", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(BadReferenceError, match="must be at most 50000000"):
        pictures.as_png(png_that_says(width, height), 32, 32)


@pytest.mark.parametrize(
    "data", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP", png_that_says(64, 64)]
)
def test_what_is_broken_is_refused(data):
    with pytest.raises(BadReferenceError, match="cannot be decoded"):
        pictures.as_png(data, 32, 32)
    whole = encoded(Image.fromarray(PIXELS))
    with pytest.raises(BadReferenceError, match="cannot be decoded"):
        pictures.as_png(whole[: len(whole) // 2], 32, 32)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GIF89a", "a GIF"),
        (b"\0\0\0\x20ftypisom", "an MP4 video"),
        (b"\0\0\0\x20ftypheic", "a HEIC picture"),
        (b"\x1aE\xdf\xa3", "a WebM or Matroska video"),
        (b"RIFF\0\0\0\0AVI ", "something else"),
        (b"", "something else"),
    ],
)
def test_what_is_no_picture_is_named(data, words):
    assert (pictures.format_of(data), pictures.words_for(data)) == (None, words)


# A server of a checkpoint that begins with a picture.


@pytest.fixture(scope="module", params=["5b-i2v", "1.5-5b-i2v"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / request.param
    toy.pipeline(request.param, scheduler_kind="dpm").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def place(tmp_path, checkpoint):
    url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    return Settings(checkpoint, url, str(tmp_path / "files"), name="toy", lease_seconds=5.0, poll_seconds=0.01)


@pytest.fixture
def context(place):
    served = Served.of(place.model, "toy", None, None, "float32", "cpu")
    opened = Context(Models([served]), Store(place.store), Files(place.files), None, Limits(), place)
    yield opened
    opened.store.close()


@pytest.fixture
def client(context):
    return TestClient(build(context))


def upload(client, data, name="p.png", **fields):
    values = {"prompt": "a cat", "num_inference_steps": "4", "seed": "3", **fields}
    return client.post("/v1/videos", data=values, files={"input_reference": (name, data, "image/png")})


def refused(response, param="input_reference"):
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    return response.json()["error"]["message"]


def test_a_picture_is_an_upload_or_a_data_url(client, context):
    data = encoded(Image.fromarray(PIXELS))
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    asked = {"prompt": "a cat", "input_reference": {"image_url": url}}
    for response in (upload(client, data), client.post("/v1/videos", json=asked)):
        assert response.status_code == 200, response.text
        video_id = response.json()["id"]
        kept = b"".join(context.files.pieces(video_id, REFERENCE, 0, 10**6))
        assert kept == pictures.as_png(data, toy.SIZE, toy.SIZE)
        assert response.json()["strength"] is None


def test_what_such_a_model_does_not_take_is_refused_before_it_is_queued(client, context, tmp_path):
    picture = encoded(RED)
    frames = [RED] * 9
    video = write_video(frames, tmp_path / "v.mp4", 8).read_bytes()
    animation = write_video(frames, tmp_path / "v.gif", 8).read_bytes()
    assert "is missing: this model makes videos of a picture" in refused(
        client.post("/v1/videos", json={"prompt": "x"})
    )
    assert "is an MP4 video; model 'toy' begins with a picture: PNG, JPEG or WebP" in refused(upload(client, video))
    assert "is a GIF; model 'toy'" in refused(upload(client, animation))
    assert "is something else" in refused(upload(client, b"hello"))
    assert "cannot be decoded" in refused(upload(client, picture[:60]))
    assert "at most 50000000" in refused(upload(client, png_that_says(9000, 9000)))
    assert "begins with a picture" in refused(upload(client, picture, strength="0.5"), "strength")
    refused(upload(client, picture, num_frames="4"), "num_frames")
    assert context.store.ids() == set() and context.files.job_ids() == set()


def test_a_text_model_says_what_takes_a_picture(tmp_path):
    folder = tmp_path / "text"
    toy.pipeline().save_pretrained(folder)
    place = Settings(str(folder), f"sqlite:///{tmp_path / 'jobs.sqlite'}", str(tmp_path / "files"))
    served = Served.of(str(folder), "text", None, None, "float32", "cpu")
    context = Context(Models([served]), Store(place.store), Files(place.files), None, Limits(), place)
    message = refused(upload(TestClient(build(context)), encoded(RED, "JPEG")))
    assert "is a JPEG picture" in message and "of a video, with strength" in message
    assert "image-to-video checkpoint" in message
    assert context.store.ids() == set() and context.files.job_ids() == set()


def test_a_checkpoint_of_control_videos_is_still_refused(tmp_path):
    toy.pipeline("fun").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="FastCogVideoXFunControlPipeline"):
        Served.of(str(tmp_path), "fun", None, None, "float32", "cpu")


@pytest.fixture(scope="module")
def maker(checkpoint):
    settings = Settings(checkpoint, "", "", threads=torch.get_num_threads(), preview_seconds=0.0)
    return Maker(dataclasses.replace(settings, checkpoint_seconds=0.0))


def run(place, maker, ended):
    """A worker in this thread, until `ended()`."""
    worker, done = Worker(place), threading.Event()

    def watch():
        while not done.is_set() and not ended():
            done.wait(0.005)
        worker.end()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        worker.work(maker)
    finally:
        done.set()
        thread.join()


def expected(checkpoint, data, path, steps=4, seed=3):
    """The file that the pipeline alone makes."""
    pipe = FastCogVideoXImageToVideoPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with threads.fixed(torch.get_num_threads()):
        latents = pipe(
            image=Image.open(BytesIO(pictures.as_png(data, toy.SIZE, toy.SIZE))),
            prompt="a cat",
            height=toy.SIZE,
            width=toy.SIZE,
            num_frames=toy.NUM_FRAMES,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            max_sequence_length=toy.TEXT_LENGTH,
            output_type="latent",
        ).frames
        chunks = list(pipe.decode_stream(latents, toy.NUM_FRAMES))
    images = [i for c in chunks for i in pipe.video_processor.postprocess_video(c, output_type="pil")[0]]
    return write_video(images, path, 8, repeatable=True).read_bytes()


def test_it_makes_what_the_pipeline_makes_also_after_it_was_parked(client, context, place, maker, tmp_path):
    data, store = encoded(Image.fromarray(PIXELS)), context.store
    video_id = upload(client, data, fps="8").json()["id"]
    other_id = upload(client, encoded(RED), fps="8").json()["id"]
    while not store.get(video_id).ended:
        before = store.get(video_id).done
        run(place, maker, lambda before=before: store.get(video_id).done > before or store.get(video_id).ended)
    run(place, maker, lambda: not store.queue_length())
    job = store.get(video_id)
    assert (job.status, job.result["made_steps"]) == ("completed", 4), job.error_message
    made = b"".join(context.files.pieces(video_id, VIDEO, 0, 10**7))
    assert made == expected(place.model, data, tmp_path / "expected.mp4")
    assert made != b"".join(context.files.pieces(other_id, VIDEO, 0, 10**7)), "the picture counts"
    assert job.bytes == context.files.sizes(video_id), "the picture is among what is kept"

    remix = client.post(f"/v1/videos/{video_id}/remix", json={"prompt": "a dog"})
    assert remix.status_code == 200, remix.text
    kept = [b"".join(context.files.pieces(i, REFERENCE, 0, 10**6)) for i in (video_id, remix.json()["id"])]
    assert kept[0] == kept[1]
    assert "begins with a picture" in refused(
        client.post(f"/v1/videos/{video_id}/remix", json={"prompt": "a dog", "strength": 0.5}), "strength"
    )
    context.files.remove(video_id, REFERENCE)
    gone = client.post(f"/v1/videos/{video_id}/remix", json={"prompt": "a dog"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_worker_that_is_killed_goes_on_to_the_same_bits(checkpoint, tmp_path):
    data = encoded(Image.fromarray(PIXELS))
    server = Server(tmp_path / "folder", checkpoint, "--device", "cpu", "--dtype", "float32")
    try:
        fields = {"num_inference_steps": 60, "seed": 3, "fps": 8}
        made = server.client.videos.create(prompt="a cat", input_reference=("p.png", data), extra_body=fields)
        server.kill_its_worker_in_the_middle_of(made.id, 20)
        job = server.wait(made.id)
        assert 0 < job.result["made_steps"] < 60, "it went on"
        video = server.video(made.id)
    finally:
        server.end()
    with threads.at_most(1):
        assert video == expected(checkpoint, data, tmp_path / "expected.mp4", steps=60)
