"""What is said of a recipe's videos: their distance from exact, what is lost, and when the gate is red."""

import random

import pytest
import torch

from tests import toy
from tools.demo_model import data, recipes


@pytest.fixture(scope="module")
def exact():
    """Two batches of rendered scenes, as exact would make them, with latents of 50 steps."""
    rng = random.Random(0)
    clips = [(data.render(scene, rng).transpose(0, 1) + 1) / 2 for scene in data.HELD_OUT[:4]]
    latents = torch.randn(50, 2, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    return [{"frames": torch.stack(clips[i : i + 2]).half(), "latents": latents.half()} for i in (0, 2)]


def changed(batches, noise):
    generator = torch.Generator().manual_seed(1)

    def near(tensor):
        return (tensor.float() + noise * torch.randn(tensor.shape, generator=generator)).half()

    return [{"frames": near(batch["frames"]), "latents": near(batch["latents"])} for batch in batches]


def test_distance_of_known_noise(exact):
    found = recipes.distance(changed(exact, 0.01), exact)
    assert found["psnr_db"] == pytest.approx(40, abs=0.2) and found["psnr_lowest_db"] <= found["psnr_db"]
    assert found["latent_error_step_1"] == pytest.approx(0.01, rel=0.1) and 0.5 < found["ssim"] < 1


@pytest.mark.slow
def test_the_gate_asks_for_the_floor_and_for_what_the_videos_show(exact):
    good = recipes.row("run", "int8", "bfloat16", changed(exact, 0.01), exact)
    assert good.gate == "green" and good.extras["shape_accuracy"] == good.extras["shape_accuracy_exact"] == 1
    far = recipes.row("run", "int8", "bfloat16", changed(exact, 0.05), exact)
    assert far.gate == "red" and "PSNR 26" in far.gate_detail
    other = [{**batch, "frames": batch["frames"].flip(1)} for batch in exact]  # all moves go the other way
    lost = recipes.row("run", "int8", "bfloat16", other, exact)
    assert lost.gate == "red" and "lost more than 2% of" in lost.gate_detail and "motion" in lost.gate_detail


def test_emulated_fp8_rounds_the_recipes_linears_and_no_others():
    transformer = toy.transformer("2b")
    recipes.emulate(transformer)
    emulated = {name for name, module in transformer.named_modules() if type(module) is recipes.EmulatedLinear}
    assert len(emulated) == 6 * len(transformer.transformer_blocks) and not any("norm" in name for name in emulated)
    linear = transformer.transformer_blocks[0].ff.net[2]
    x = torch.randn(2, 7, linear.in_features)
    with torch.no_grad():
        exact = torch.nn.functional.linear(x, linear.weight, linear.bias)
        error = (linear(x) - exact).norm() / exact.norm()
    assert 0.005 < error < 0.1  # three bits of mantissa, in both: 0.04
