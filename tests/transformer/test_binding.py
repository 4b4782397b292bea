"""What a generation does to the blocks' linears, that it leaves no trace, and what it compiles."""

import copy
import io

import pytest
import torch
from cogvx_kernels._triton import why_unavailable as why_not_triton
from cogvx_kernels.adaln import cpu as stream
from cogvx_kernels.packed_linear import cpu as onednn
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig
from torch._dynamo.utils import counters

from cogvx_fast.plan import Product
from cogvx_fast.transformer import FastCogVideoXTransformer3DModel
from cogvx_fast.transformer.binding import bind
from cogvx_fast.transformer.linear import BufferedFeedForward, CublasLtLinear, FeedForwardPair, MergedLinear
from cogvx_fast.transformer.linear import OneDnnLinear as Packed
from tests import toy
from tests.generation import bound, fast_model, plain, plan, relative, run, session

needs_stream = pytest.mark.skipif(stream.why_unavailable() is not None, reason=str(stream.why_unavailable()))
needs_onednn = pytest.mark.skipif(onednn.why_unavailable() is not None, reason=str(onednn.why_unavailable()))
SWITCHES = [{}, {"pack_weights": False}, {"fuse_operations": False}, {"fuse_projections": False}]


@pytest.mark.parametrize("variant", toy.VARIANTS)
@pytest.mark.parametrize("config", SWITCHES, ids=str)
def test_every_plan_gives_diffusers_numbers(variant, config):
    reference = toy.transformer(variant)
    model = FastCogVideoXTransformer3DModel.adopt(reference)
    with (current := session(model, **config)).active():
        assert relative(run(model, current), plain(reference, current)) < 1e-5
        kind = type(None) if config.get("fuse_projections") is False else MergedLinear
        assert all(type(how.qkv) is kind for how in bound(model, current))


@pytest.mark.parametrize("product", [Product.MODULES, Product.CUBLASLT, Product.BUFFERED])
def test_every_product_gives_diffusers_numbers(product):
    if product is Product.BUFFERED and stream.why_unavailable() is not None:
        pytest.skip(stream.why_unavailable())
    model = fast_model("1.5-5b")
    forms = {Product.MODULES: type(None), Product.CUBLASLT: FeedForwardPair, Product.BUFFERED: BufferedFeedForward}
    with (current := session(model, plan=plan(model, {"product": product}))).active():
        output = run(model, current)
        assert all(
            how.ff is None if forms[product] is None else type(how.ff) is forms[product]
            for how in bound(model, current)
        )
    # On a CPU the call that CUBLASLT makes takes the exact form of the GELU, which is 4e-4 off at most.
    assert relative(output, plain(model, current)) < (1e-2 if product is Product.CUBLASLT else 1e-5)


def test_head_dim_64_in_bf16_is_as_close_as_diffusers():
    truth = toy.transformer(attention_head_dim=64)
    reference = copy.deepcopy(truth).bfloat16()
    model = FastCogVideoXTransformer3DModel.adopt(copy.deepcopy(reference))
    current = session(model)
    expected = [plain(truth, current, step) for step in range(5)]
    own = [plain(reference, current, step, dtype=torch.bfloat16) for step in range(5)]
    with current.active():
        ours = [run(model, current, step, dtype=torch.bfloat16) for step in range(5)]
        if onednn.why_unavailable() is None:
            assert all(type(how.qkv) is type(how.out) is Packed for how in bound(model, current))
    assert sum(map(relative, ours, expected)) <= 1.1 * sum(map(relative, own, expected))
    if onednn.why_unavailable() is None:
        assert all(block.packed_bytes == 12 * 128 * 128 * 2 for block in current.ran.blocks)


def storages(model):
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"pack_weights": False}], ids=str)
def test_weights_keep_their_names_values_and_memory(config, dtype, tmp_path):
    reference = toy.transformer().to(dtype)
    expected = {name: value.clone() for name, value in reference.state_dict().items()}
    model = FastCogVideoXTransformer3DModel.adopt(reference)
    before = sum(storages(model).values())
    run(model, session(model, **config), dtype=dtype)
    state = model.state_dict()
    assert sum(storages(model).values()) == before
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)
    model.save_pretrained(tmp_path)
    loaded = CogVideoXTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_merged_weights_are_storages_of_their_own():
    model = fast_model()
    weight = model.transformer_blocks[0].attn1.to_k.weight

    def saved():
        torch.save(weight, file := io.BytesIO())
        return len(file.getvalue())

    before, address = saved(), weight.data_ptr()
    run(model, session(model, pack_weights=False))
    assert weight.data_ptr() != address, "it was not merged"
    assert saved() == before and weight.untyped_storage().nbytes() == weight.nbytes


def test_weights_merged_before_are_found_again():
    model = fast_model()
    with (current := session(model, pack_weights=False)).active():
        run(model, current)
        first = [how.qkv.weight.data_ptr() for how in bound(model, current)]
    with (current := session(model, pack_weights=False)).active():
        run(model, current)
        assert [how.qkv.weight.data_ptr() for how in bound(model, current)] == first


def test_merged_weights_can_be_trained_after_a_generation_in_inference_mode():
    model = fast_model()
    with torch.inference_mode():
        run(model, session(model, pack_weights=False))
    weight = model.transformer_blocks[0].attn1.to_k.weight
    assert not weight.is_inference()
    model.transformer_blocks[0].attn1.to_k(torch.randn(1, 64)).sum().backward()
    with torch.no_grad():
        weight.add_(weight.grad)


@needs_stream
def test_blocks_share_one_buffer_in_fp32():
    model = fast_model()
    with (current := session(model)).active():
        outputs = [run(model, current) for _ in range(2)]
        assert relative(outputs[0], plain(model, current)) < 1e-5 and torch.equal(*outputs)
        assert len({how.ff.hidden.data_ptr() for how in bound(model, current)}) == 1
        larger = {"height": 6, "width": 10}  # than what the buffer was made for
        assert relative(run(model, current, **larger), plain(model, current, **larger)) < 1e-5


def test_merged_weights_follow_a_change_of_any_of_them():
    model = fast_model()
    with (current := session(model, pack_weights=False)).active():
        before = run(model, current)
        with torch.no_grad():
            model.transformer_blocks[1].attn1.to_k.weight.mul_(2)  # a view of the merged memory
        weight = model.transformer_blocks[2].attn1.to_v.weight
        weight.data = torch.randn_like(weight)
        after = run(model, current)
        assert relative(after, plain(model, current)) < 1e-5 and relative(after, before) > 1e-3


@needs_onednn
@pytest.mark.parametrize("watched", [False, True])
def test_packed_copies_follow_a_change_that_torch_counts_and_if_watched_every_one(watched):
    model = fast_model().bfloat16()
    weight = model.transformer_blocks[0].ff.net[2].weight
    with (current := session(model, watched=watched)).active():
        run(model, current, dtype=torch.bfloat16)
        with torch.no_grad():
            weight.mul_(2)
        run(model, current, dtype=torch.bfloat16)
        assert current.ran.counts["bindings"] == 2
        weight.data.mul_(2)  # as merging an adapter does
        run(model, current, dtype=torch.bfloat16)
        assert current.ran.counts["bindings"] == (3 if watched else 2)


@pytest.mark.parametrize("config", [{}, {"pack_weights": False}], ids=str)
def test_an_adapter_is_called_not_merged_over(config):
    model = fast_model()
    with (current := session(model, **config)).active():
        without = run(model, current)
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_k"]))
        again = run(model, current)  # the same generation: it is noticed
        assert current.ran.counts["bindings"] == 2 and all(how.qkv is None for how in bound(model, current))
        assert relative(again, plain(model, current)) < 1e-5 and relative(again, without) > 1e-3
        model.disable_adapters()
        assert relative(run(model, current), without) < 1e-5


def test_the_end_of_a_generation_leaves_nothing():
    model = fast_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with (current := session(model)).active():
        run(model, current)
        assert current.bindings and current._modulation and current._text
    assert not current.bindings and not current._modulation and not current._text and not current._positions
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.fixture
def graphs():
    """How many graphs dynamo has compiled since, and how often it broke one."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
def test_blocks_share_one_graph_that_serves_every_prompt_step_and_seed(variant, graphs):
    model = fast_model(variant)
    with (current := session(model, compile="blocks")).active():
        for step, seed in ((0, 0), (1, 0), (3, 5)):
            output = run(model, current, step, seed=seed)
            assert relative(output, plain(model, current, step, seed=seed)) < 1e-5
    with (other := session(model, 7, compile="blocks")).active():  # another generation, of another number of steps
        run(model, other, 6)
        assert graphs() == (1, 0)
        for height, width in ((6, 10), (8, 4), (10, 12)):  # other sizes cost one more graph in all
            sizes = {"height": height, "width": width}
            output = run(model, other, 2, **sizes)
            assert variant != "2b" or relative(output, plain(model, other, 2, **sizes)) < 1e-5
    assert graphs() == (2, 0)


@pytest.mark.parametrize("variant", toy.VARIANTS)
def test_compiled_blocks_give_diffusers_numbers(variant, graphs):
    reference = toy.transformer(variant)
    model = FastCogVideoXTransformer3DModel.adopt(reference)
    current = session(model, compile="blocks")
    assert relative(run(model, current), plain(reference, current)) < 1e-5
    assert graphs() == (1, 0)


def test_full_compiles_all_blocks_as_one_graph(graphs):
    model = fast_model("5b")
    with (current := session(model, compile="full")).active():
        for step in (0, 3):
            assert relative(run(model, current, step), plain(model, current, step)) < 1e-5
    assert graphs() == (1, 0)


@pytest.mark.skipif(why_not_triton() is not None, reason=str(why_not_triton()))
def test_on_a_gpu_a_block_runs_triton_and_one_product_has_the_gelu():
    model = fast_model("5b").half()
    on_gpu = plan(model, {"operations": "triton", "product": Product.CUBLASLT})
    (how, *_) = bind(model.transformer_blocks, on_gpu, 10, False)
    assert how.operations == "triton" and how.chains and type(how.qkv) is MergedLinear
    assert how.ran().packed_bytes == 0
    assert [type(how.ff.first), type(how.ff.second)] == [CublasLtLinear, MergedLinear]
    assert how.ff.first.weight.data_ptr() == model.transformer_blocks[0].ff.net[0].proj.weight.data_ptr()


def test_a_block_of_a_dtype_that_an_implementation_does_not_have_runs_in_torch():
    model = fast_model().double()
    for operations in ("cpu", "triton"):
        (how, *_) = bind(model.transformer_blocks, plan(model, {"operations": operations}), 10, False)
        assert how.operations == "torch"
    model = fast_model()
    model.transformer_blocks[1].norm1.half()  # of two dtypes: those on a CPU take one
    how = bind(model.transformer_blocks, plan(model, {"operations": "cpu"}), 10, False)
    assert [each.operations for each in how] == ["cpu", "torch", "cpu"]


def test_the_product_with_the_gelu_in_it_is_the_product_and_the_gelu():
    weight, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(2, 3, 4)
    # On a CPU the same call takes the exact form of the GELU.
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    assert torch.allclose(CublasLtLinear(weight, bias)(x), expected, atol=1e-6)
