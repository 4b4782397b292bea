"""Command lines: whatever is asked for, there is an order that can be carried out, or one clear refusal."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvx_fast.cli import making

from . import harness
from .harness import examples
from .values import NAME, PATH, REAL, WHOLE

OPTIONS = {
    "--output": PATH,
    "--prompt-file": PATH,
    "--steps": WHOLE,
    "--guidance": REAL,
    "--negative": NAME,
    "--frames": WHOLE,
    "--height": WHOLE,
    "--width": WHOLE,
    "--seed": st.one_of(WHOLE, st.just("random"), NAME),
    "--num-videos": WHOLE,
    "--max-sequence-length": WHOLE,
    "--fps": WHOLE,
    "--zoom": WHOLE,
    "--engine": st.one_of(st.sampled_from(["exact", "balanced", "turbo"]), NAME),
    "--speed": st.one_of(st.sampled_from(["2", "fast", "quality", "12.5"]), NAME, REAL),
    "--schedule": PATH,
    "--memory-limit": st.one_of(st.sampled_from(["8GiB", "1 MB", "300MiB"]), NAME, WHOLE),
    "--dtype": st.one_of(st.sampled_from(["float32", "bfloat16", "float16"]), NAME),
    "--device": st.one_of(st.sampled_from(["cpu", "cuda", "mps"]), NAME),
    "--scheduler": st.one_of(st.sampled_from(["ddim", "dpm"]), NAME),
    "--sheet": PATH,
    "--image": PATH,
    "--last-image": PATH,
    "--video": PATH,
    "--control-video": PATH,
    "--strength": REAL,
    "--fit": st.one_of(st.sampled_from(["crop", "pad", "stretch"]), NAME),
    "--lora": st.one_of(PATH, st.builds("{}:{}".format, PATH, REAL)),
    "--like": PATH,
    "--recipe": st.one_of(st.sampled_from(["int8", "fp8", "native"]), NAME),
    "--attention": st.one_of(st.sampled_from(["sdpa", "triton", "auto"]), NAME),
    "--compile": st.one_of(st.sampled_from(["off", "blocks"]), NAME),
    "--vae-memory": st.one_of(st.sampled_from(["2GiB", "1 KB"]), NAME, WHOLE),
    "--offload": st.one_of(st.sampled_from(["model", "sequential"]), NAME),
    "--preview": PATH,
    "--terminal-preview": st.one_of(st.sampled_from(["auto", "kitty", "iterm2", "sixel", "off"]), NAME),
    "--enhance-model": NAME,
    "--enhance-local": PATH,
}


@st.composite
def lines(draw):
    """A few options, most of them right: a line with many faults finds the first alone."""
    chosen = draw(st.lists(st.sampled_from(sorted(OPTIONS)), unique=True, max_size=4))
    return [draw(st.one_of(st.just("a red circle"), NAME))] + [
        text for name in chosen for text in (name, str(draw(OPTIONS[name])))
    ]


@pytest.fixture(autouse=True, scope="module")
def orders():
    """Orders are checked and not carried out."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "run", made.append)
        yield made


@examples(100)
@given(line=lines())
def test_generate(orders, line):
    orders.clear()
    outcome = harness.command("command lines", ["generate", *line])
    if outcome.status:
        assert not orders and "error" in outcome.said.lower()
        return
    if not orders:  # --help and the like
        return
    (job,) = orders
    numbers = [value for value in dataclasses.asdict(job).values() if isinstance(value, int | float)]
    assert all(math.isfinite(number) for number in numbers)
    assert 1 <= job.steps <= 1000 and job.num_frames >= 1 and job.height % 16 == 0 == job.width % 16
    assert all(prompt.strip() for prompt in job.prompts) and all(0 <= seed < 2**64 for seed in job.seeds)
    assert len(job.prompts) == len(job.outputs) == len(job.seeds)


@examples(60)
@given(
    name=st.sampled_from(["doctor", "quantize", "calibrate", "bench", "kernels", "nonsense"]),
    rest=st.lists(
        st.one_of(NAME, st.sampled_from(["--model", "--frames", "--prompts", "run", "list", "check", "report"])),
        max_size=4,
    ),
)
def test_other_commands(name, rest):
    if name in ("bench", "kernels") and {"run", "report", "check", "inspect", "build"} & set(rest):
        return  # they would do what they are for
    harness.command("command lines", [name, *rest])
