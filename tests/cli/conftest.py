import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cogvx_fast import FastCogVideoXPipeline, machine
from cogvx_fast.cli import app
from tests import toy


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A toy CogVideoX with random weights, saved in diffusers format."""
    folder = tmp_path_factory.mktemp("toy") / "checkpoint"
    toy.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def configuration(tmp_path):
    """Writes a checkpoint's JSON files alone: a folder that can be checked but never loaded."""

    def write(name="model", pipeline_class="CogVideoXPipeline", scheduler=None, vae=None, **transformer):
        folder = tmp_path / name
        index = {
            "_class_name": pipeline_class,
            "tokenizer": ["transformers", "T5Tokenizer"],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLCogVideoX"],
            "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        }
        transformer = {"_class_name": "CogVideoXTransformer3DModel", **transformer}
        scheduler = scheduler or {"num_train_timesteps": 1000}
        for path, content in {
            "model_index.json": index,
            "transformer/config.json": transformer,
            "scheduler/scheduler_config.json": scheduler,
            "tokenizer/tokenizer.json": {},
            "text_encoder/config.json": {},
            "vae/config.json": vae or {},
        }.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(json.dumps(content))
        return folder

    return write


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in an empty folder: `run("generate", "a cat")` -> exit_code, stdout, stderr, and files left."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return SimpleNamespace(
            exit_code=result.exit_code,
            stdout=result.stdout,
            stderr=result.stderr,
            files=sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
        )

    return invoke


@pytest.fixture(autouse=True)
def _plain_cpu(monkeypatch):
    """A CPU that is as fast in fp32 as in bf16, so that defaults do not depend on where the tests run."""
    monkeypatch.setattr(machine, "cpu_bf16_units", lambda: None)


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of the pipeline, and the pipeline itself under "pipe"."""
    recorded, call = [], FastCogVideoXPipeline.__call__

    def record(self, **kwargs):
        recorded.append({**kwargs, "pipe": self})
        return call(self, **kwargs)

    monkeypatch.setattr(FastCogVideoXPipeline, "__call__", record)
    return recorded


def assert_usage_error(result, *expected):
    assert result.exit_code == 2, result.stderr
    assert result.files == [], "nothing is left"
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    for text in expected:
        assert str(text) in result.stderr
