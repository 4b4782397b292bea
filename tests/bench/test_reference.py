import torch
from diffusers import CogVideoXPipeline

from cogvx_fast.bench.reference import build_pipeline, like, randomize, widened
from cogvx_fast.bench.workloads import Workload
from tests import toy

CPU = torch.device("cpu")
SMALL = {"num_attention_heads": 1, "num_layers": 2, "text_embed_dim": 8, "time_embed_dim": 8, "sample_frames": 1}
VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}


def small_workload():
    return Workload("small", "", ("dit-step",), transformer=SMALL, vae=VAE, num_frames=1, height=32, width=32)


def test_random_weights_are_the_same_each_time_and_of_a_useful_size():
    first, second = (build_pipeline(small_workload(), torch.float32, CPU) for _ in range(2))
    for name in ("transformer", "vae"):
        weights = [dict(getattr(pipe, name).state_dict()) for pipe in (first, second)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
        assert not getattr(first, name).training
    # Buffers are computed and not random.
    position = first.transformer.patch_embed.pos_embedding
    assert not position.is_meta and position.abs().max() <= 1
    x = torch.randn(3, 64)
    assert 0.5 < first.transformer.transformer_blocks[0].attn1.to_q(x).std() < 2


def test_affine_weights_are_about_one_and_biases_about_zero():
    model = randomize(toy.transformer(), 0, torch.float32, CPU)
    norm = model.transformer_blocks[0].norm1.norm
    assert norm.weight.min() > 0.5 and norm.weight.max() < 1.5 and norm.weight.std() > 0.01
    assert norm.bias.abs().max() < 0.5 and norm.bias.std() > 0.01


def test_the_wide_copy_has_the_same_weights_and_leaves_the_original():
    pipe = CogVideoXPipeline(None, None, None, toy.transformer().to(torch.bfloat16), toy.scheduler())
    wide = widened(pipe, torch.float32)
    assert pipe.transformer.dtype is torch.bfloat16 and wide.transformer.dtype is torch.float32
    key = "proj_out.weight"
    assert torch.equal(wide.transformer.state_dict()[key], pipe.transformer.state_dict()[key].float())


def test_like_shares_everything_but_what_is_given():
    pipe = CogVideoXPipeline(None, None, None, toy.transformer(), toy.scheduler())
    other = like(pipe, transformer=toy.transformer(seed=1))
    assert other.scheduler is pipe.scheduler and other.transformer is not pipe.transformer
