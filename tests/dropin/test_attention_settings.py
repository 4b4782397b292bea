"""set_attention_backend, the context manager and parallelism: an effect or a refusal in words, never neither."""

import pytest
import torch
from diffusers import ContextParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

from cogvx_fast import EngineConfig, accelerate
from tests import toy

from .generations import assert_differs, assert_same, latents, line, outcome


@pytest.fixture(autouse=True)
def everybodys_default():
    """diffusers' `set_attention_backend` makes it the default of every model, and never takes that back."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.fixture
def counted(monkeypatch):
    """How often each backend of diffusers' dispatcher was called."""
    calls, backends = {}, _AttentionBackendRegistry._backends

    def counting(name, function):
        def call(*args, **kwargs):
            calls[name.value] = calls.get(name.value, 0) + 1
            return function(*args, **kwargs)

        return call

    for name, function in list(backends.items()):
        monkeypatch.setitem(backends, name, counting(name, function))
    return calls


BACKENDS = ("native", "_native_math", "native_math")


def known(names):
    return [name for name in names if name in {member.value for member in AttentionBackendName}]


@pytest.mark.parametrize("name", known(BACKENDS))
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_backend_set_by_hand_is_used(name, when, counted):
    expected = latents(toy.pipeline())
    pipe = toy.pipeline()
    if when == "before":
        pipe.transformer.set_attention_backend(name)
    fast = accelerate(pipe)
    if when == "after":
        fast.transformer.set_attention_backend(name)
    assert_same(latents(fast), expected)
    if when == "after":
        assert counted.get(name) == 9  # three blocks, three steps
        assert name in line(fast, "attention").detail
    elif not counted.get(name):  # upstream it has no effect on this family, so there was none to keep
        assert line(fast, "attention").applied
    fast.transformer.reset_attention_backend()
    counted.clear()
    assert_same(latents(fast), expected)
    assert name == "native" or name not in counted


@pytest.mark.parametrize("name", ["flash", "sage", "xformers", "_flash_3", "flex"])
def test_a_backend_that_is_not_here(name):
    """As upstream: it raises when it is set, and nothing is changed."""
    results = []
    for model in (toy.transformer(), (fast := accelerate(toy.pipeline())).transformer):
        results.append(outcome(lambda model=model: model.set_attention_backend(name)))
    if isinstance(results[0], Exception):
        assert type(results[1]) is type(results[0])
        assert_same(latents(fast), latents(toy.pipeline()))


def test_an_unknown_backend():
    fast = accelerate(toy.pipeline())
    with pytest.raises(ValueError, match="warp"):
        fast.transformer.set_attention_backend("warp")
    assert_same(latents(fast), latents(toy.pipeline()))


@pytest.mark.parametrize("name", [name for name in known(BACKENDS) if name != "native"])
def test_the_context_manager_has_no_effect_and_that_is_said(name, counted):
    """`with attention_backend(...)` is diffusers' default for all models, which none of this family follows."""
    fast = accelerate(toy.pipeline())
    expected = latents(toy.pipeline())
    with attention_backend(name), pytest.warns(UserWarning, match=rf"{name}.*set_attention_backend"):
        assert_same(latents(fast), expected)
    assert name not in counted and f"not {name}, which `attention_backend`" in line(fast, "attention").detail
    counted.clear()
    assert_same(latents(fast), expected)


def test_the_context_manager_beside_the_engines_own():
    """What the user asks for by name, in two ways at once, is not decided in silence."""
    fast = accelerate(toy.pipeline(), EngineConfig(attention="sdpa"))
    with attention_backend("_native_math"):
        try:
            assert_same(latents(fast), latents(toy.pipeline()))
        except ValueError as error:
            assert "attention" in str(error)
            return
    assert "sdpa" in line(fast, "attention").detail or "_native_math" in line(fast, "attention").detail


def test_one_processor_of_the_users_own():
    class Own(CogVideoXAttnProcessor2_0):
        calls = 0

        def __call__(self, *args, **kwargs):
            Own.calls += 1
            video, text = super().__call__(*args, **kwargs)
            return video * 0.5, text

    results = []
    for when in ("reference", "before", "after"):
        Own.calls, pipe = 0, toy.pipeline()
        if when == "after":
            pipe = accelerate(pipe)
        pipe.transformer.transformer_blocks[1].attn1.set_processor(Own())
        if when == "before":
            pipe = accelerate(pipe)
        results.append(latents(pipe))
        assert Own.calls == 3
    assert_differs(results[0], latents(toy.pipeline()))
    for output in results[1:]:
        assert_same(output, results[0])


def test_all_processors_by_name_and_back():
    fast = accelerate(toy.pipeline())
    expected = latents(toy.pipeline())
    before = fast.transformer.attn_processors
    assert before.keys() == toy.transformer().attn_processors.keys()
    fast.transformer.set_attn_processor(CogVideoXAttnProcessor2_0())
    assert_same(latents(fast), expected)
    fast.transformer.set_attn_processor(before)
    assert_same(latents(fast), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_fused_projections_of_diffusers(when):
    expected = latents(toy.pipeline())
    pipe = toy.pipeline()
    if when == "before":
        pipe.fuse_qkv_projections()
    fast = accelerate(pipe)
    if when == "after":
        fast.fuse_qkv_projections()
    assert_same(latents(fast), expected)
    fast.unfuse_qkv_projections()
    assert_same(latents(fast), expected)


def test_attention_kwargs_reach_the_processor():
    class Taking(CogVideoXAttnProcessor2_0):
        def __call__(self, *args, factor=1.0, **kwargs):
            video, text = super().__call__(*args, **kwargs)
            return video * factor, text

    results = []
    for pipe in (toy.pipeline(), accelerate(toy.pipeline())):
        pipe.transformer.set_attn_processor(Taking())
        results.append(latents(pipe, attention_kwargs={"factor": 0.5}))
    assert_differs(results[0], latents(toy.pipeline()))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("group", ["no process group", "a group of one"])
@pytest.mark.parametrize("degree", ["ring_degree", "ulysses_degree"])
def test_context_parallelism_has_an_effect_or_is_refused(degree, group, tmp_path):
    """Upstream has no plan for this family and raises; ours wants the processes, which are not here."""
    outcomes = []
    if group == "a group of one":
        where = f"file://{tmp_path / 'group'}"
        torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        for pipe in (toy.pipeline(), accelerate(toy.pipeline())):
            config = ContextParallelConfig(**{degree: 2})
            outcomes.append(
                outcome(lambda pipe=pipe, config=config: pipe.transformer.enable_parallelism(config=config))
            )
            assert_same(latents(pipe), latents(toy.pipeline()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert isinstance(outcomes[0], Exception)
    if group == "no process group":
        assert isinstance(outcomes[1], RuntimeError) and "torchrun" in str(outcomes[1])
    else:
        assert isinstance(outcomes[1], ValueError) and "must be the number of processes, which is 1" in str(outcomes[1])


def test_a_sharding_plan_is_of_a_forward_that_runs():
    """A plan names modules and where their arguments are split: of ours it has to hold as of upstream's, or be refused.

    The published plan of other families splits what the first block is given; here it is the model's own inputs.
    """
    from diffusers.hooks.context_parallel import ContextParallelInput

    plan = {"transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)}}
    kinds = []
    for model in (toy.transformer(), accelerate(toy.pipeline()).transformer):
        config = ContextParallelConfig(ring_degree=2)
        result = outcome(lambda model=model, config=config: model.enable_parallelism(config=config, cp_plan=plan))
        kinds.append(type(result))
    assert issubclass(kinds[0], Exception) and kinds[1] is NotImplementedError
