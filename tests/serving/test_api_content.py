"""The routes of a video: its state, its files in all forms, its end."""

import pytest
from PIL import Image

from cogvx_fast.serving.files import PREVIEW, VIDEO
from tests.serving.asking import assert_error


def test_a_completed_video(client, completed):
    job = completed()
    response = client.get(f"/v1/videos/{job.id}")
    video = response.json()
    assert (video["status"], video["progress"], video["eta_seconds"]) == ("completed", 100, None)
    assert video["expires_at"] == int(job.completed_at + 7 * 86400)
    assert video["stage_seconds"] == {"denoise": 2.0} and video["engine_report"] == "engine: exact"
    assert response.headers["openai-poll-after-ms"] == "500"
    assert_error(client.get("/v1/videos/video_x"), 404, "not_found", "video_id")


@pytest.mark.parametrize(
    ("variant", "media_type", "magic", "frames"),
    [
        ("video", "video/mp4", b"ftyp", 9),
        ("gif", "image/gif", b"GIF89a", 9),
        ("webp", "image/webp", b"WEBP", 9),
        ("thumbnail", "image/webp", b"WEBP", 1),
        ("spritesheet", "image/jpeg", b"JFIF", 1),
    ],
)
def test_variants(client, completed, store, files, variant, media_type, magic, frames, tmp_path):
    job = completed()
    for _ in range(2):
        response = client.get(f"/v1/videos/{job.id}/content", params={"variant": variant})
        assert response.status_code == 200 and response.headers["content-type"] == media_type
        assert magic in response.content[:16]
    assert store.get(job.id).bytes == files.sizes(job.id)
    if variant in ("gif", "webp", "thumbnail"):
        (tmp_path / "file").write_bytes(response.content)
        with Image.open(tmp_path / "file") as image:
            assert getattr(image, "n_frames", 1) == frames and image.size == (48, 32)
    if variant == "spritesheet":
        (tmp_path / "file").write_bytes(response.content)
        with Image.open(tmp_path / "file") as image:
            assert image.size == (4 * 48, 3 * 32)


def test_parts_of_a_file(client, completed):
    job = completed()
    url = f"/v1/videos/{job.id}/content"
    whole = client.get(url)
    data, etag = whole.content, whole.headers["etag"]
    assert whole.headers["accept-ranges"] == "bytes" and int(whole.headers["content-length"]) == len(data)
    for wanted, start, end in (("0-9", 0, 10), ("10-", 10, len(data)), ("-7", len(data) - 7, len(data))):
        part = client.get(url, headers={"range": f"bytes={wanted}"})
        assert part.status_code == 206 and part.content == data[start:end]
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{len(data)}"
    past_its_end = client.get(url, headers={"range": f"bytes=5-{10**9}"})
    assert past_its_end.status_code == 206 and past_its_end.content == data[5:]
    beyond = client.get(url, headers={"range": f"bytes={len(data)}-"})
    assert_error(beyond, 416, "invalid_range", "Range")
    assert beyond.headers["content-range"] == f"bytes */{len(data)}"
    for not_one_part in ("bytes=0-1,3-4", "lines=1-2", "bytes=-", "bytes=9-2"):
        assert client.get(url, headers={"range": not_one_part}).content == data
    assert client.get(url, headers={"if-none-match": f'"x", {etag}'}).status_code == 304
    assert client.get(url, headers={"range": "bytes=0-1", "if-range": '"other"'}).content == data
    head = client.head(url)
    assert head.status_code == 200 and head.content == b"" and head.headers["content-length"] == str(len(data))


def test_content_that_is_not_there(client, add, completed, files):
    assert_error(client.get(f"/v1/videos/{add().id}/content"), 409, "not_completed", "video_id")
    job = completed()
    assert_error(client.get(f"/v1/videos/{job.id}/content?variant=mov"), 400, "invalid_value", "variant")
    files.remove(job.id, VIDEO)
    for variant in ("video", "gif"):
        assert_error(client.get(f"/v1/videos/{job.id}/content?variant={variant}"), 404, "not_found", "video_id")


def test_deleting_takes_job_and_files(client, completed, files):
    job = completed()
    assert client.delete(f"/v1/videos/{job.id}").json() == {"id": job.id, "object": "video.deleted", "deleted": True}
    assert files.job_ids() == set()
    assert_error(client.get(f"/v1/videos/{job.id}"), 404, "not_found", "video_id")
    assert_error(client.delete(f"/v1/videos/{job.id}"), 404, "not_found", "video_id")


def test_cancelling(client, add, completed):
    video = client.post(f"/v1/videos/{add().id}/cancel").json()
    assert (video["status"], video["error"]["code"]) == ("failed", "cancelled"), "a client that polls must see its end"
    assert client.post(f"/v1/videos/{completed().id}/cancel").json()["status"] == "completed"


def test_a_preview(client, add, files):
    job = add()
    assert_error(client.get(f"/v1/videos/{job.id}/preview"), 404, "no_preview", "video_id")
    files.write(job.id, PREVIEW, lambda path: Image.new("RGB", (8, 8)).save(path))
    response = client.get(f"/v1/videos/{job.id}/preview")
    assert response.headers["content-type"] == "image/webp" and b"WEBP" in response.content
