"""What the Ray application may be told; without Ray."""

import pytest

from cogvx_fast import demo_checkpoint
from cogvx_fast.cli.console import UsageError
from cogvx_fast.serving.ray_arguments import Arguments


def refused(**given):
    with pytest.raises(UsageError) as caught:
        arguments = Arguments.of(given)
        arguments.served()
    return caught.value.argument, str(caught.value)


def test_texts_of_a_command_line_become_what_they_mean(tmp_path):
    given = {"model": demo_checkpoint(), "max_replicas": "4", "keep_gib": "1.5", "insecure": "true"}
    arguments = Arguments.of({**given, "gpus_per_replica": "0", "cpus_per_replica": "3", "folder": str(tmp_path)})
    (served,) = arguments.served()
    settings = arguments.settings(served)
    assert (served.name, settings.name, settings.model) == ("demo", "demo", demo_checkpoint())
    assert (settings.device, settings.threads, settings.dtype) == ("cpu", 3, served.dtype)
    assert settings.store == f"sqlite:///{tmp_path}/jobs.sqlite" and settings.files == f"{tmp_path}/videos"
    assert arguments.limits().max_bytes == 3 * 2**29 and arguments.insecure and arguments.max_replicas == 4


def test_several_models_have_names():
    models = f"small={demo_checkpoint()},large={demo_checkpoint()}"
    arguments = Arguments.of({"models": models, "gpus_per_replica": 0})
    assert [served.name for served in arguments.served()] == ["small", "large"]
    assert arguments.settings(arguments.served()[1]).name == "large"


def test_a_gpu_that_is_on_another_machine_is_no_reason_to_refuse():
    (served,) = Arguments.of({"model": demo_checkpoint()}).served()
    assert served.device == "cuda:0"
    assert served.order({"prompt": "a red circle", "num_inference_steps": 4}).num_frames == 17


def test_the_gpus_of_a_replica_make_each_video_together():
    given = {"model": demo_checkpoint(), "gpus_per_replica": "2", "parallel": "guidance=2"}
    arguments = Arguments.of(given)
    (served,) = arguments.served()
    settings = arguments.settings(served)
    assert settings.devices == ("cuda:0", "cuda:1") and settings.parallel == "guidance=2"
    assert served.device == "cuda:0"


@pytest.mark.parametrize(
    ("given", "argument", "words"),
    [
        ({"replicas": "2"}, "replicas", "is no argument; must be one of model, name, models"),
        ({"max_replicas": "many"}, "max_replicas", "'many'"),
        ({"max_replicas": "0"}, "max_replicas", "greater than or equal to 1"),
        ({"keep_gib": "9" * 309}, "keep_gib", "less than or equal to 1000000000"),
        ({"max_work": "0"}, "max_work", "greater than or equal to 1"),
        ({"min_replicas": "3", "max_replicas": "2"}, "max_replicas", "must be at least min_replicas, 3"),
        ({"parallel": "ulysses=2"}, "parallel", "no effect on replicas with one device"),
        (
            {"gpus_per_replica": "2", "parallel": "ulysses=3"},
            "--parallel",
            "must be the number of processes, which is 2",
        ),
        ({"api_replicas": "0"}, "api_replicas", "greater than or equal to 1"),
        ({"lease_seconds": "nan"}, "lease_seconds", "nan"),
        ({"dtype": "int8"}, "dtype", "'float32'"),
        ({"engine": "fastest"}, "--engine", "fastest"),
        ({"model": "/no/such/folder"}, "--model", "no such folder"),
        ({"models": "a=x,b"}, "models", "must be NAME=MODEL,NAME=MODEL"),
        ({"models": "a=x,a=y"}, "models", "two models"),
        ({"models": "=x"}, "models", "must not be empty"),
        ({"models": "a=x", "name": "b"}, "models", "leave out model and name"),
    ],
)
def test_what_cannot_work_is_named(given, argument, words):
    found, message = refused(**given)
    assert found == argument and words in message, message


def test_others_are_let_in_by_keys_or_by_an_express_wish():
    for host in ("127.0.0.1", "localhost", "::1"):
        Arguments.of({}).check_exposed(host)
    for host in ("0.0.0.0", "10.1.2.3", "::"):
        Arguments.of({"insecure": "true"}).check_exposed(host)
        Arguments.of({"api_keys_file": "keys.txt"}).check_exposed(host)
        with pytest.raises(UsageError, match=f"Ray listens at {host}.*insecure=true"):
            Arguments.of({}).check_exposed(host)
