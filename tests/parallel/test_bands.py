"""The autoencoder in bands of rows: the same numbers as whole frames, to rounding, and the same bits at all ranks."""

import numpy as np
import pytest
import torch

from cogvx_fast.parallel.bands import Band
from cogvx_fast.parallel.ranks import Axis
from cogvx_fast.vae import FastAutoencoderKLCogVideoX
from tests.vae.conftest import family

from . import jobs

pytestmark = pytest.mark.slow


def exact(what, size):
    """By diffusers' own code in double precision, and the error of the same in single precision."""
    model = family()
    frames = torch.randn(size[0], 16 if what == "decode" else 3, *size[1:], generator=torch.Generator().manual_seed(1))

    def run(frames):
        if what == "decode":
            return model.decode(frames).sample
        return model.encode(frames).latent_dist.parameters

    with torch.no_grad():
        single = run(frames).numpy()
        model = model.double()
        return run(frames.double()).numpy(), single


def error(made, wanted):
    assert made.shape == wanted.shape
    return float(np.sqrt(np.mean((made - wanted) ** 2)))


@pytest.mark.parametrize("implementation", ["torch", "cpu", "triton"])
@pytest.mark.parametrize(
    ("what", "size"),
    [
        # Chunks of 3, 2 and 2 latent frames; rows that two, three and four do not all divide.
        ("decode", (1, 7, 5, 3)),
        ("decode", (2, 2, 4, 2)),
        ("encode", (3, 17, 40, 16)),
        ("encode", (2, 1, 32, 24)),
    ],
)
def test_bands_give_whole_frames(processes, what, size, implementation):
    wanted, single = exact(what, size)
    ((whole, _),) = processes.run(1, jobs.through_the_autoencoder, what, size, False, implementation)
    # Some CPUs' convolutions round our whole frames more than diffusers' own: `tests/vae` judges that, this bands.
    budget = 1.1 * max(error(single, wanted), error(whole, wanted))
    for number in (2, 3, 4):
        made = processes.run(number, jobs.through_the_autoencoder, what, size, True, implementation)
        assert all((other == made[0][0]).all() for other, _ in made)
        assert not made[0][1]
        assert error(made[0][0], wanted) <= budget, number


@pytest.mark.parametrize("implementation", ["torch", "cpu", "triton"])
def test_bands_within_a_budget(processes, implementation):
    """Convolutions some rows at a time, frames that wait elsewhere: within a band as within a frame."""
    size = (1, 5, 8, 6)
    wanted, single = exact("decode", size)
    model = FastAutoencoderKLCogVideoX.adopt(family())
    plan = model.plan_decode((1, 16, 5, 4, 6), keeps_output=False)
    for budget in (int(plan.peak * 0.7), int(plan.peak * 0.55)):
        made = processes.run(2, jobs.through_the_autoencoder, "decode", size, True, implementation, budget)
        assert error(made[0][0], wanted) <= 1.1 * error(single, wanted)
        assert (made[0][0] == made[1][0]).all()


def test_fewer_rows_than_processes_are_decoded_whole(processes):
    (whole, why), *others = processes.run(4, jobs.through_the_autoencoder, "decode", (1, 2, 3, 4), True)
    (alone, _), *_ = processes.run(2, jobs.through_the_autoencoder, "decode", (1, 2, 3, 4), False)
    assert (whole == alone).all() and all((other == whole).all() for other, _ in others)
    assert why == {"frames": "3 rows of latents are no bands for all processes"}
    (_, why), *_ = processes.run(2, jobs.through_the_autoencoder, "encode", (1, 1, 36, 16), True)
    assert why == {"frames": "4 rows of latents and 4 of pixels are no bands for all processes"}


def test_a_band_is_whole_rows_of_latents():
    frames = torch.arange(56.0).view(1, 56)
    bands = [Band.of(Axis(3, index, "x"), 7) for index in range(3)]
    assert [band.units for band in bands] == [(2, 2, 3)] * 3
    assert torch.cat([band.own(frames, 1) for band in bands], 1).equal(frames)
    assert bands[1].own(frames, 1).flatten().tolist() == list(range(16, 32))
    assert Band.of(Axis(), 7) is None and Band.of(Axis(8, 0, "x"), 7) is None
