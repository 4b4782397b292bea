"""What a generation does to the blocks' linears, that it leaves no trace, and what it compiles."""

import copy

import pytest
import torch
from cogvx_kernels.cpu import linear as onednn
from cogvx_kernels.cpu import stream
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig
from torch._dynamo.utils import counters

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.attention import AttentionBackend, resolve
from cogvx_fast.transformer import EngineSession, FastCogVideoXTransformer3DModel
from cogvx_fast.transformer import plan as planning
from cogvx_fast.transformer.block import FastCogVideoXBlock
from cogvx_fast.transformer.plan import GeluLinear, MergedLinear, PackedLinear, plan_blocks
from tests import toy

from .test_model import forward_inputs, relative


def session(compiles="off", **config):
    scheduler = toy.scheduler()
    scheduler.set_timesteps(5)
    return EngineSession(EngineConfig(**config), scheduler, compiles)


@torch.no_grad()
def run(model, current, step=0, **sizes):
    arguments = forward_inputs(model, **sizes)
    arguments["timestep"] = current.scheduler.timesteps[step].expand(2)
    with model.session(current):
        return model(**arguments).sample


@torch.no_grad()
def plain(model, current, step=0, **sizes):
    arguments = forward_inputs(model, **sizes)
    arguments["timestep"] = current.scheduler.timesteps[step].expand(2)
    return model(**arguments).sample


@pytest.mark.parametrize("variant", toy.VARIANTS)
@pytest.mark.parametrize("config", [{}, {"pack_weights": False}, {"pack_weights": False, "fuse_projections": False}])
def test_every_plan_gives_diffusers_numbers(variant, config):
    reference = toy.transformer(variant)
    model, current = FastCogVideoXTransformer3DModel.adopt(reference), session(**config)
    assert relative(run(model, current), plain(reference, current)) < 1e-5
    kind = type(None) if config.get("fuse_projections") is False else MergedLinear
    assert all(type(plan.qkv) is kind for plan in current.block_plans)


def test_head_dim_64_in_bf16_is_as_close_as_diffusers():
    truth = toy.transformer(attention_head_dim=64)
    reference = copy.deepcopy(truth).bfloat16()
    model, current = FastCogVideoXTransformer3DModel.adopt(copy.deepcopy(reference)), session()
    for processor in model.joint_processors:
        processor.backend = resolve(AttentionBackend.AUTO, "cpu", torch.bfloat16, 64).capability
    expected = [plain(truth, current, step) for step in range(5)]
    own = [plain(reference, current, step, dtype=torch.bfloat16).float() for step in range(5)]
    ours = [run(model, current, step, dtype=torch.bfloat16).float() for step in range(5)]
    assert sum(map(relative, ours, expected)) <= 1.1 * sum(map(relative, own, expected))
    if onednn.why_not() is None:
        assert all(type(plan.qkv) is type(plan.out) is PackedLinear for plan in current.block_plans)
        assert all(plan.packed_bytes == 12 * 128 * 128 * 2 for plan in current.block_plans)


@pytest.mark.parametrize("config", [{}, {"pack_weights": False}])
def test_weights_keep_their_names_values_and_memory(config, tmp_path):
    reference = toy.transformer()
    expected = {name: value.clone() for name, value in reference.state_dict().items()}
    model = FastCogVideoXTransformer3DModel.adopt(reference)
    before = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())
    run(model, session(**config))
    after = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())
    state = model.state_dict()
    assert after == before
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)
    model.save_pretrained(tmp_path)
    loaded = CogVideoXTransformer3DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.skipif(stream.why_not() is not None, reason=str(stream.why_not()))
def test_blocks_share_one_buffer_in_fp32():
    model, current = FastCogVideoXTransformer3DModel.adopt(toy.transformer()), session()
    expected = plain(model, current)
    outputs = [run(model, current) for _ in range(2)]
    assert relative(outputs[0], expected) < 1e-5 and torch.equal(*outputs)
    assert len({plan.ff.hidden.data_ptr() for plan in current.block_plans}) == 1
    assert relative(run(model, current, height=6, width=10), plain(model, current, height=6, width=10)) < 1e-5


def test_merged_weights_follow_a_change_of_any_of_them():
    model = FastCogVideoXTransformer3DModel.adopt(toy.transformer())
    run(model, session(pack_weights=False))
    with torch.no_grad():
        model.transformer_blocks[1].attn1.to_k.weight.mul_(2)  # a view of the merged memory
    model.transformer_blocks[2].attn1.to_v.weight.data = torch.randn_like(model.transformer_blocks[2].attn1.to_v.weight)
    current = session(pack_weights=False)
    assert relative(run(model, current), plain(model, current)) < 1e-5


@pytest.mark.parametrize("config", [{}, {"pack_weights": False}])
def test_an_adapter_is_called_not_merged_over(config):
    model = FastCogVideoXTransformer3DModel.adopt(toy.transformer())
    current = session(**config)
    without = run(model, current)
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_k"]))
    again = run(model, current)  # the same generation: the plan notices
    assert current.counts["plans"] == 2 and all(plan.qkv is None for plan in current.block_plans)
    assert relative(again, plain(model, current)) < 1e-5 and relative(again, without) > 1e-3


def test_the_report_says_what_was_done():
    fast = accelerate(toy.pipeline())
    fast(**toy.inputs(output_type="latent"))
    line = next(line for line in fast.engine_report().lines if line.name == "projections")
    assert line.applied and "Q, K and V in one product in 3 of 3 blocks" in line.detail
    fast.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    fast(**toy.inputs(output_type="latent"))
    line = next(line for line in fast.engine_report().lines if line.name == "projections")
    assert "in one product in 0 of 3 blocks; the others have adapters" in line.detail


def test_training_runs_the_modules_themselves():
    model = FastCogVideoXTransformer3DModel.adopt(toy.transformer())
    arguments = forward_inputs(model)
    with model.session(session()):
        model(**arguments).sample.square().mean().backward()
    assert all(p.grad is not None for p in model.transformer_blocks[0].attn1.parameters())


@pytest.fixture
def graphs():
    """How many graphs dynamo has compiled since, and how often it broke one."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
def test_blocks_share_one_graph_that_serves_every_prompt_step_and_seed(variant, graphs):
    model = FastCogVideoXTransformer3DModel.adopt(toy.transformer(variant))
    current = session("blocks")
    for step, seed in ((0, 0), (1, 0), (3, 5)):
        output = run(model, current, step, seed=seed)
        assert relative(output, plain(model, current, step, seed=seed)) < 1e-5
    other = session("blocks")  # another generation, with another number of steps
    other.scheduler.set_timesteps(7)
    run(model, other, 6)
    assert graphs() == (1, 0)
    for height, width in ((6, 10), (8, 4), (10, 12)):  # other sizes cost one more graph in all
        sizes = {"height": height, "width": width}
        if variant == "2b":
            assert relative(run(model, current, 2, **sizes), plain(model, current, 2, **sizes)) < 1e-5
        else:
            run(model, current, 2, **sizes)
    assert graphs() == (2, 0)


@pytest.mark.parametrize("variant", toy.VARIANTS)
def test_compiled_blocks_give_diffusers_numbers(variant, graphs):
    reference = toy.transformer(variant)
    model, current = FastCogVideoXTransformer3DModel.adopt(reference), session("blocks")
    assert relative(run(model, current), plain(reference, current)) < 1e-5
    assert graphs() == (1, 0)


def test_full_compiles_all_blocks_as_one_graph(graphs):
    model = FastCogVideoXTransformer3DModel.adopt(toy.transformer("5b"))
    current = session("full")
    for step in (0, 3):
        assert relative(run(model, current, step), plain(model, current, step)) < 1e-5
    assert graphs() == (1, 0)


def test_compile_is_chosen_by_the_device_and_stated():
    fast = accelerate(toy.pipeline())
    fast(**toy.inputs(output_type="latent"))
    line = next(line for line in fast.engine_report().lines if line.name == "compile")
    assert not line.applied and "off on cpu" in line.detail
    with pytest.raises(
        ValueError, match=r"EngineConfig\.compile='yes' is unknown; allowed: 'auto', 'off', 'blocks', 'full'"
    ):
        EngineConfig(compile="yes")


@pytest.mark.skipif(planning.why_not_triton() is not None, reason=str(planning.why_not_triton()))
def test_on_a_gpu_a_block_runs_triton_and_one_product_has_the_gelu(monkeypatch):
    block = FastCogVideoXBlock(toy.transformer("5b").transformer_blocks[0])
    monkeypatch.setattr(planning, "_place", lambda block: (torch.device("cuda"), torch.float16))
    plan = plan_blocks([block], EngineConfig(), 10, compiled=True)[0]
    assert plan.impl == "triton" and type(plan.qkv) is MergedLinear and plan.packed_bytes == 0
    assert [type(plan.ff.first), type(plan.ff.second)] == [GeluLinear, MergedLinear]
    assert plan.ff.first.weight.data_ptr() == block.ff.net[0].proj.weight.data_ptr()
    without = plan_blocks([block], EngineConfig(fuse_operations=False), 10, compiled=True)[0]
    assert without.impl == "torch" and without.ff is None
    odd = FastCogVideoXBlock(toy.transformer("2b", attention_head_dim=24).transformer_blocks[0])
    assert plan_blocks([odd], EngineConfig(), 10, compiled=True)[0].impl == "torch"
    monkeypatch.setattr(planning, "why_not_triton", lambda *_: "triton is not installed")
    assert plan_blocks([block], EngineConfig(), 10, compiled=True)[0].impl == "torch"


def test_the_product_with_the_gelu_in_it_is_the_product_and_the_gelu():
    weight, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(2, 3, 4)
    # On a CPU the same call takes the exact form of the GELU.
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    assert torch.allclose(GeluLinear(weight, bias)(x), expected, atol=1e-6)
