"""What serves the page: its files, what browsers are told about them, what it is told of the model."""

import dataclasses
import re

import pytest
from fastapi.testclient import TestClient

from cogvx_fast import demo_checkpoint
from cogvx_fast.serving.about import about
from cogvx_fast.serving.api import build
from cogvx_fast.serving.context import Context, Limits
from cogvx_fast.serving.keys import Keys, add_key
from cogvx_fast.serving.models import Models
from cogvx_fast.serving.orders import Served
from cogvx_fast.serving.ui import is_origin


@pytest.fixture(scope="module")
def served():
    return Served.of(demo_checkpoint(), "demo", None, None, "float32", "cpu")


@pytest.fixture
def client(served, store, files, place):
    context = Context(Models([served]), store, files, None, Limits(), place, embedded_in=("https://example.org",))
    return TestClient(build(context))


def test_the_page_and_all_that_it_names_are_there(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    names = set(re.findall(r'"(page/[a-z.]+)"', page.text))
    assert {"page/page.css", "page/page.js", "page/icon.svg"} <= names
    scripts = [client.get(name).text for name in names if name.endswith(".js")]
    names |= {f"page/{name}" for text in scripts for name in re.findall(r'from "./([a-z]+\.js)"', text)}
    assert {"page/api.js", "page/form.js", "page/gallery.js", "page/stage.js"} <= names
    for name in names:
        answer = client.get(name)
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert not re.findall(r"https?://(?!www\.w3\.org)", answer.text), "nothing is fetched from elsewhere"
    assert client.head("/").status_code == 200


def test_nothing_but_its_own_files_runs(client):
    policy = dict(part.strip().split(" ", 1) for part in client.get("/").headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == policy["media-src"] == "'self' data: blob:"
    assert policy["frame-ancestors"] == "'self' https://example.org"
    assert not re.findall(r"<script(?![^>]*src=)|\sstyle=|\son[a-z]+=", client.get("/").text)


def test_scripts_never_make_markup_of_text(client):
    for name in ("api", "form", "gallery", "page", "stage"):
        text = client.get(f"page/{name}.js").text
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


def test_a_browser_keeps_files_and_asks_whether_they_are_still_those(client):
    answer = client.get("page/page.js")
    assert answer.headers["cache-control"] == "no-cache"
    for tag in (answer.headers["etag"], f'"other", W/{answer.headers["etag"]}'):
        again = client.get("page/page.js", headers={"If-None-Match": tag})
        assert again.status_code == 304 and not again.content
    assert client.get("page/page.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("name", ["nothing.js", "..%2fui.py", "%2e%2e/ui.py", "__init__.py"])
def test_there_are_no_other_files(client, name):
    assert client.get(f"/page/{name}").status_code == 404


def test_it_is_no_part_of_the_api(client):
    assert [path for path in client.get("/openapi.json").json()["paths"] if not path.startswith("/v1")] == [
        *("/healthz", "/readyz", "/metrics")
    ]


def test_what_a_model_is_offered_with_is_taken(client):
    said = client.get("page/about").json()
    assert said["ready"] is False
    (model,) = said["models"]
    fields = ("width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale")
    asked = {"prompt": "a red circle", "seed": 1, "model": model["id"], "engine": model["engines"][0]}
    answer = client.post("/v1/videos", json=asked | {name: model[name] for name in fields})
    assert answer.status_code == 200, answer.text
    # What the page leaves out is the same, but for the guidance that suits the demo.
    default = client.post("/v1/videos", json={"prompt": "a red circle"}).json()
    assert all(default[name] == model[name] for name in fields if name != "guidance_scale")
    for frames in model["frame_choices"]:
        for scheduler in model["schedulers"]:
            asked = {"prompt": "a", "num_frames": frames, "scheduler": scheduler, "width": 2 * model["multiple"]}
            assert client.post("/v1/videos", json=asked).status_code == 200
    for name in ("width", "height"):
        beyond = client.post("/v1/videos", json={"prompt": "a", name: model["multiple"] + 1})
        assert beyond.json()["error"]["param"] == name
    steps = client.post("/v1/videos", json={"prompt": "a", "num_inference_steps": model["max_steps"] + 1})
    assert steps.json()["error"]["param"] == "num_inference_steps"


def test_models_of_other_kinds(served):
    def of(**values):
        variant = dataclasses.replace(served.checkpoint.variant, **values)
        checkpoint = dataclasses.replace(served.checkpoint, variant=variant, source="another")
        return about(dataclasses.replace(served, checkpoint=checkpoint))

    demo, other = about(served), of(sample_height=60, sample_width=90, sample_frames=49)
    assert "red circle" in demo["examples"][0] and "circle" not in " ".join(other["examples"])
    assert (other["width"], other["height"], other["guidance_scale"]) == (720, 480, 6.0)
    assert other["frame_choices"][0] == 9 and 49 in other["frame_choices"] and other["max_width"] is None
    newer = of(patch_size_t=2, sample_height=300, sample_width=300, sample_frames=81)
    assert (newer["width"], newer["height"], newer["max_width"], newer["fps"]) == (1360, 768, 2400, 16)
    assert newer["frame_choices"][:2] == [17, 33]
    learned = of(use_learned_positional_embeddings=True, sample_frames=49)
    assert learned["fixed_size"] and learned["frame_choices"] == [49]
    picture = of(in_channels=32)
    assert picture["task"] == "image-to-video"
    assert (picture["reference"]["kinds"], picture["reference"]["required"]) == (["image"], True)


def test_all_models_are_offered_the_first_first(served, store, files, place):
    models = Models([served, dataclasses.replace(served, name="another")])
    client = TestClient(build(Context(models, store, files, None, Limits(), place)))
    assert [model["id"] for model in client.get("page/about").json()["models"]] == ["demo", "another"]


def test_who_has_no_key_is_told_so_and_nothing_else(served, store, files, place, tmp_path):
    key = add_key(tmp_path / "keys", "anna")
    client = TestClient(build(Context(Models([served]), store, files, Keys(tmp_path / "keys"), Limits(), place)))
    assert client.get("/").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = client.get("page/about", headers=headers)
        assert answer.json() == {"key_needed": True} and answer.headers["cache-control"] == "no-store"
    assert "models" in client.get("page/about", headers={"Authorization": f"Bearer {key}"}).json()


@pytest.mark.parametrize(
    "text", ["*", "example.org", "https://a.b/c", "https://a.b; script-src *", "https://", "http://a\n"]
)
def test_what_is_no_web_site(text):
    assert not is_origin(text)


def test_what_is_a_web_site():
    assert is_origin("https://huggingface.co") and is_origin("http://localhost:3000")
