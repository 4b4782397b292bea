"""Videos that are made of videos: of one that comes with the request, or that was made before."""

import base64

from cogvx_fast.serving import references
from cogvx_fast.serving.files import REFERENCE, VIDEO
from tests.serving.asking import ask, assert_error


def test_a_remix_has_the_noise_and_settings_of_its_source(client, completed, store):
    job = completed(seed=11, scheduler="dpm", negative_prompt="a dog")
    video = client.post(f"/v1/videos/{job.id}/remix", json={"prompt": "a blue square"}).json()
    assert video["remixed_from_video_id"] == job.id
    assert store.get(video["id"]).request == {**job.request, "prompt": "a blue square"}


def test_a_remix_with_a_strength_is_made_of_the_video(client, completed, store, files):
    job = completed()
    video = client.post(f"/v1/videos/{job.id}/remix", json={"prompt": "a blue square", "strength": 0.5}).json()
    assert (video["strength"], store.get(video["id"]).total) == (0.5, 2)
    assert files.size(video["id"], REFERENCE) == files.size(job.id, VIDEO)


def test_what_cannot_be_remixed(client, add, completed):
    response = client.post(f"/v1/videos/{add().id}/remix", json={"prompt": "x"})
    assert_error(response, 409, "not_completed", "video_id")
    url = f"/v1/videos/{completed().id}/remix"
    assert_error(client.post(url, json={"prompt": " "}), 400, "invalid_value", "prompt")
    assert_error(client.post(url, json={"prompt": "x", "size": "1x1"}), 400, "unknown_parameter", "size")
    assert_error(client.post(url, content=b"{"), 400, "invalid_json")


def test_a_reference_is_an_upload_or_a_data_url(client, store, files, mp4):
    data = mp4()
    upload = {"input_reference": ("clip.mp4", data, "video/mp4")}
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    responses = [
        client.post("/v1/videos", data={"prompt": "x", "strength": "0.5"}, files=upload),
        ask(client, strength=0.5, input_reference={"image_url": url}),
        client.post("/v1/videos", data={"prompt": "x", "strength": "0.5", "input_reference[video_url]": url}),
    ]
    for response in responses:
        assert response.status_code == 200, response.text
        job = store.get(response.json()["id"])
        assert job.request["strength"] == 0.5 and job.total == 25
        assert b"".join(files.pieces(job.id, REFERENCE, 0, 10**6)) == data


def test_references_that_are_refused_leave_nothing(client, store, files, mp4, monkeypatch):
    def refused(status=400, code="invalid_reference", param="input_reference", data=b"", **fields):
        upload = {"input_reference": ("clip.mp4", data, "video/mp4")}
        return assert_error(
            client.post("/v1/videos", data={"prompt": "x", **fields}, files=upload), status, code, param
        )

    assert "cannot be decoded" in refused(data=b"no video")
    assert "has 9 frames, 17 are to be made" in refused(code="invalid_value", data=mp4(9))
    assert "must be 0.02 to 1" in refused(code="invalid_value", param="strength", data=mp4(), strength="0")
    monkeypatch.setattr(references, "MAX_PIXELS", 63 * 48)
    assert "64x48 pixels" in refused(data=mp4())
    monkeypatch.setattr(references, "MAX_BYTES", 100)
    assert "at most" in refused(data=mp4())
    for url in (
        "http://169.254.169.254/",
        "file:///etc/passwd",
        "data:video/mp4;base64,!!",
        "data:text/html;base64,aa",
    ):
        assert_error(ask(client, input_reference={"image_url": url}), 400, "invalid_reference", "input_reference")
    assert_error(ask(client, input_reference={}), 400, "invalid_reference", "input_reference")
    wrong = client.post("/v1/videos", data={"prompt": "x"}, files={"other": ("a", b"x")})
    assert_error(wrong, 400, "unknown_parameter", "other")
    assert store.ids() == set() and files.job_ids() == set()
