"""On a GPU that is not torch's current one all of a generation runs with it made current; pretended without a GPU."""

import ast
import contextlib
import dataclasses
import re
from pathlib import Path

import pytest
import torch

from cogvx_fast import EngineConfig, accelerate, devices, generation
from cogvx_fast.session import EngineSession
from cogvx_fast.vae import choose_vae
from tests import toy
from tests.generation import fast_model, plan, run, session

PACKAGE = Path(devices.__file__).parent
SECOND = torch.device("cuda", 1)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, of which 0 is current: `.current` is the one that is, `.entered` are those that were made it."""

    class Gpus:
        def __init__(self):
            self.current, self.entered, self.awaited = 0, [], []

        @contextlib.contextmanager
        def device(self, device):
            before, self.current = self.current, torch.device(device).index
            self.entered.append(self.current)
            try:
                yield
            finally:
                self.current = before

    pretended = Gpus()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", pretended.device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: pretended.awaited.append(device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pretended.current)
    return pretended


def test_a_gpu_is_current_within_the_block_and_its_number_is_told(gpus):
    with devices.current("cuda:1"):
        assert gpus.current == 1
        assert devices.indexed("cuda") == SECOND
    assert gpus.current == 0 and devices.indexed("cuda") == torch.device("cuda", 0)
    assert devices.indexed("cuda:1") == SECOND and devices.indexed("cpu") == torch.device("cpu")
    devices.synchronize(SECOND)
    assert gpus.awaited == [SECOND]


@pytest.mark.parametrize("device", ["cpu", "meta", None])
def test_other_devices_are_left_alone(gpus, device):
    with devices.current(device):
        devices.synchronize(device)
    assert gpus.entered == [] and gpus.awaited == []


def test_without_a_gpu_nothing_is_entered(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with devices.current("cuda:1"):
        devices.synchronize("cuda:1")
    assert gpus.entered == [] and gpus.awaited == []


def test_a_session_makes_its_gpu_current_and_gives_it_back(gpus):
    model = fast_model()
    of_second = EngineSession(plan(model, {"device": SECOND}))
    with of_second.active():
        assert gpus.current == 1
    with pytest.raises(KeyboardInterrupt), of_second.active():
        raise KeyboardInterrupt
    assert gpus.current == 0


def test_all_of_a_generation_runs_on_its_gpu(gpus, monkeypatch):
    """The plan says `cuda:1`, the tensors of this machine stay on the CPU."""
    resolve, seen = generation.resolve, {}

    def on_second(*arguments):
        made = resolve(*arguments)
        return dataclasses.replace(made, device=SECOND, vae=dataclasses.replace(made.vae, device=SECOND))

    def noting(name, function):
        def noted(*args, **kwargs):
            seen.setdefault(name, set()).add(gpus.current)
            return function(*args, **kwargs)

        return noted

    monkeypatch.setattr(generation, "resolve", on_second)
    fast = accelerate(toy.pipeline(), EngineConfig(fast_vae=True))
    for name, model in (("step", fast.transformer), ("decode", fast.vae.decoder.conv_in.conv)):
        model.forward = noting(name, model.forward)
    fast.text_encoder.forward = noting("text", fast.text_encoder.forward)
    fast(**toy.inputs(output_type="pt"))
    assert seen == {"text": {1}, "step": {1}, "decode": {1}}
    assert gpus.current == 0


def test_stages_wait_for_the_gpus_of_the_pipeline_alone(gpus, monkeypatch):
    fast = accelerate(toy.pipeline())
    monkeypatch.setattr(type(fast), "_execution_device", property(lambda self: SECOND))
    with fast._stage("text"):
        assert gpus.current == 1
    assert gpus.current == 0 and gpus.awaited == [SECOND, SECOND]
    monkeypatch.setattr(type(fast), "_execution_device", property(lambda self: torch.device("cpu")))
    gpus.awaited.clear()
    with fast._stage("text"):
        pass
    assert gpus.awaited == [] and set(fast.stage_seconds) == {"text"}


@pytest.fixture
def entered(monkeypatch):
    """The devices that were made current, of whatever kind."""
    devices_entered = []
    monkeypatch.setattr(
        devices, "current", lambda device: contextlib.nullcontext(devices_entered.append(torch.device(device)))
    )
    return devices_entered


def test_blocks_run_where_their_tensors_are(entered):
    model = fast_model()
    of_second = session(model, plan=plan(model, {"device": SECOND}))
    entered.clear()
    run(model, of_second)
    assert entered == [SECOND, torch.device("cpu")]  # the generation's, and that of the stream


@torch.no_grad()
def test_an_autoencoder_called_by_itself_runs_where_its_tensors_are(entered):
    vae = accelerate(toy.pipeline(), EngineConfig(fast_vae=True)).vae
    latents = torch.zeros(1, vae.config.latent_channels, 5, 4, 4, dtype=torch.float32, device="cpu")
    entered.clear()
    chunks = vae.decode_stream(latents)
    for number in (1, 2):
        next(chunks)
        assert entered == [torch.device("cpu")] * number
    entered.clear()
    frames = vae.decode(latents).sample
    assert entered == [torch.device("cpu")] * 2
    entered.clear()
    vae.encode(frames)
    assert entered and set(entered) == {torch.device("cpu")}


def test_weights_are_quantized_where_they_are(entered):
    accelerate(toy.pipeline(), EngineConfig(recipe="int8-weight"))
    assert entered and set(entered) == {torch.device("cpu")}


def test_an_autoencoders_plan_names_the_gpu_that_it_was_made_for():
    assert choose_vae(SECOND, torch.float32, True, None, toy.vae()).device == SECOND


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it needs two GPUs")
@pytest.mark.parametrize("engine", ["exact", EngineConfig(attention="triton")], ids=["exact", "triton"])
def test_a_generation_on_the_second_of_two_gpus(engine):
    outputs = []
    for device in ("cuda:0", "cuda:1"):
        pipe = toy.pipeline()
        pipe.transformer = toy.transformer(attention_head_dim=64)
        fast = accelerate(pipe.to(device, torch.float16), engine)
        outputs.append(fast(**toy.inputs(output_type="pt")).frames.cpu())
        assert torch.cuda.current_device() == 0
    assert (outputs[0] - outputs[1]).abs().max() <= 1 / 255


# What is about no device, or about which there are.
OF_NONE = {"is_available", "is_initialized", "device_count", "current_device"}


@pytest.mark.parametrize(
    "path", [p for p in sorted(PACKAGE.rglob("*.py")) if "bench" not in p.parts], ids=lambda p: p.name
)
def test_every_question_to_cuda_names_its_device(path):
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and re.fullmatch(r"torch\.cuda\.\w+", ast.unparse(node.func))
    ]
    nameless = [
        f"{path.name}:{call.lineno} {ast.unparse(call)}"
        for call in calls
        if not call.args and ast.unparse(call.func).rsplit(".", 1)[1] not in OF_NONE
    ]
    assert nameless == []
