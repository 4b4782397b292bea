"""Several models at one address."""

import pytest
from fastapi.testclient import TestClient

from cogvx_fast import demo_checkpoint
from cogvx_fast.cli.console import UsageError
from cogvx_fast.serving import orders
from cogvx_fast.serving.api import build
from cogvx_fast.serving.context import Context, Limits
from cogvx_fast.serving.models import Models, check_names, dealt, default_name
from cogvx_fast.serving.orders import Served


@pytest.fixture
def models():
    return Models([Served.of(demo_checkpoint(), name, None, None, "float32", "cpu") for name in ("demo", "other")])


@pytest.fixture
def client(models, store, files, place):
    return TestClient(build(Context(models, store, files, None, Limits(), place)))


def ask(client, **values):
    return client.post("/v1/videos", json={"prompt": "a red circle", "num_inference_steps": 4, **values})


def video(client, job):
    return client.get(f"/v1/videos/{job.id}").json()


@pytest.mark.parametrize(
    ("devices", "models", "expected"),
    [
        (["cpu"], 1, [["cpu"]]),
        (["cpu"], 2, [["cpu"], ["cpu"]]),
        (["cpu", "cpu", "cpu"], 2, [["cpu", "cpu"], ["cpu"]]),
        (["cuda:0", "cuda:1"], 2, [["cuda:0"], ["cuda:1"]]),
        (["cuda:0", "cuda:0"], 2, [["cuda:0"], ["cuda:0"]]),
        (["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:4"], 2, [["cuda:0", "cuda:2", "cuda:4"], ["cuda:1", "cuda:3"]]),
        (["cuda:0", "cpu"], 3, [["cuda:0"], ["cpu"], ["cpu"]]),
    ],
)
def test_devices_are_dealt_in_turn(devices, models, expected):
    assert dealt(devices, models, "--device") == expected


def test_a_gpu_takes_one_model_unless_it_is_named_again():
    with pytest.raises(UsageError) as caught:
        dealt(["cuda:0"], 2, "--device")
    assert (caught.value.argument, caught.value.value) == ("--device", "cuda:0")
    assert "too few for 2 models" in caught.value.allowed


def test_names(tmp_path):
    assert default_name(str(tmp_path / "nothing")) == str(tmp_path / "nothing")
    assert default_name(str(tmp_path)) == tmp_path.name and default_name("THUDM/CogVideoX-2b") == "THUDM/CogVideoX-2b"
    check_names(["a", "b"], 2, "--name")
    for names in (["a"], ["a", "a"], ["a", " "]):
        with pytest.raises(UsageError, match="--name"):
            check_names(names, 2, "--name")


def test_a_request_names_a_model_or_means_the_first(client, store):
    made = {name: ask(client, **({} if name is None else {"model": name})).json() for name in (None, "other", "demo")}
    assert {name: found["model"] for name, found in made.items()} == {None: "demo", "other": "other", "demo": "demo"}
    assert [store.get(found["id"]).model for found in made.values()] == ["demo", "other", "demo"]
    assert [job.id for job in store.waiting("other")] == [made["other"]["id"]] and len(store.waiting()) == 3
    refused = ask(client, model="sora-2")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
    assert "must be 'demo' or 'other'" in refused.json()["error"]["message"]


def test_what_a_request_is_checked_against_is_made_once(client, models, monkeypatch):
    made = []
    loaded = orders.loaded_models
    monkeypatch.setattr(orders, "loaded_models", lambda *arguments: made.append(1) or loaded(*arguments))
    for model in models:
        model.warm_up()
    before = len(made)
    assert [ask(client).status_code for _ in range(3)] == [200] * 3 and len(made) == before == 2


def test_all_are_listed(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["demo", "other"]
    assert client.get("/v1/models/other").json()["id"] == "other"


def test_it_is_ready_when_every_model_is(client, store):
    for worker, about, code in (
        ("a", {"model": "demo", "ready": True}, 503),
        ("b", {"model": "other", "ready": False}, 503),
        ("b", {"model": "other", "ready": True}, 200),
    ):
        store.seen(worker, about)
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["models"]["demo"]) == (code, True)
        assert answer.json()["models"]["other"] is (code == 200)


def test_a_job_waits_for_the_devices_of_its_model_only(client, store, add):
    for worker, model in (("a", "demo"), ("b", "demo"), ("c", "other")):
        store.seen(worker, {"model": model, "ready": True})
    of_demo, of_other = [[add(model=model) for _ in range(3)] for model in ("demo", "other")]
    assert [video(client, job)["queue_position"] for job in of_other] == [0, 1, 2]
    first, second, third = (video(client, job)["eta_seconds"] for job in of_demo)
    assert first == second and third == pytest.approx(2 * first), "two at a time"
    first, second, third = (video(client, job)["eta_seconds"] for job in of_other)
    assert [second, third] == pytest.approx([2 * first, 3 * first]), "one after the other"


def test_times_are_learned_by_model(client, store, add):
    for model, seconds in (("demo", 8.0), ("other", 80.0)):
        job = add(model=model)
        lease = store.take(job.id, "w", 10)
        store.complete(job.id, lease, {"stage_seconds": {"denoise": seconds}, "made_steps": 4}, 1)
    assert video(client, add(model="demo"))["eta_seconds"] == pytest.approx(8.0)
    assert video(client, add(model="other"))["eta_seconds"] == pytest.approx(80.0)


def test_a_worker_takes_jobs_of_its_own_model(work, add, store):
    first, own, last = add(model="other"), add(num_inference_steps=2), add(model="other")
    work(until=lambda: store.get(own.id).ended)
    assert store.get(own.id).status == "completed"
    assert [store.get(job.id).status for job in (first, last)] == ["queued", "queued"]


def test_a_job_of_a_model_that_is_not_served_any_more_waits_and_says_so(client, store, add):
    gone = add(model="gone")
    found = video(client, gone)
    assert (found["status"], found["queue_position"], found["eta_seconds"]) == ("queued", None, None)
    assert found["warnings"] == ["model 'gone' is not served now: the video waits until it is"]
    assert 'cogvx_jobs{model="gone",status="queued"} 1.0' in client.get("/metrics").text.splitlines()
    store.seen("w", {"model": "gone", "ready": True})  # a server elsewhere has it
    found = video(client, gone)
    assert found["queue_position"] == 0 and found["eta_seconds"] > 0 and found["warnings"] == []
    client.post(f"/v1/videos/{gone.id}/cancel")
    assert store.get(gone.id).error_code == "cancelled"


def test_its_video_is_there_but_cannot_be_remixed(client, store, add):
    job = add(model="gone")
    store.complete(job.id, store.take(job.id, "w", 10), {"stage_seconds": {}, "made_steps": 4}, 1)
    assert video(client, job)["status"] == "completed" and video(client, job)["warnings"] == []
    refused = client.post(f"/v1/videos/{job.id}/remix", json={"prompt": "a blue square"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
