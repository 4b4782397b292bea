"""What does not fit into free memory is refused with what does."""

from dataclasses import replace

import pytest
import torch

from cogvx_fast.memory import Models, Predictor, Request, RoomError, check_room
from cogvx_fast.memory.room import most

from .plans import CPU, GPU, plan


@pytest.fixture(scope="module")
def models():
    return Models.from_configs({"num_layers": 2}, {"num_layers": 1}, {})


@pytest.mark.parametrize("device", [CPU, GPU])
def test_what_is_said_to_fit_fits_and_no_more(device, models):
    request = Request.default(models.variant)
    how, predictor = plan(device), Predictor(models, request)
    demand = predictor.demand(how)
    needed = max(demand.activations.values()) if device == CPU else demand.peak
    check_room(needed, how, predictor)
    with pytest.raises(RoomError) as refused:
        check_room(needed - 1, how, predictor)
    assert refused.value.needed == needed and "49 frames of 720x480" in str(refused.value)
    assert ("beside the weights" in str(refused.value)) == (device == CPU)
    free = needed * 2 // 3
    with pytest.raises(RoomError) as refused:
        check_room(free, how, predictor)
    fewer, smaller = refused.value.fits
    frames, side = int(fewer.split()[0]), int(smaller.split("x")[-1])
    for more, fitting in ((8, request.of_frames(frames)), (16, replace(request, width=side, height=side))):
        check_room(free, how, Predictor(models, fitting))
        larger = fitting.of_frames(frames + more) if more == 8 else replace(request, width=side + more)
        if more == 8 or side >= request.height:
            with pytest.raises(RoomError):
                check_room(free, how, Predictor(models, larger))


@pytest.mark.parametrize("size", [{"num_frames": 8 * 10**308 + 1}, {"height": 16 * 10**308}, {"width": 16 * 10**9}])
def test_sizes_that_nothing_holds_are_refused_at_once(size, models):
    request = replace(Request.default(models.variant), **size)
    with pytest.raises(
        RoomError, match=r"needs (more than 2\^60 bytes|\d+\.\d\d GiB) for .*; what fits: \d+ frames of"
    ):
        check_room(16 * 2**30, plan(CPU), Predictor(models, request))


def test_frames_that_are_kept_count(models):
    request = replace(Request.default(models.variant), streams=True)
    how, predictor = plan(CPU), Predictor(models, request)
    free = max(predictor.demand(how).activations.values())
    check_room(free, how, predictor)
    with pytest.raises(RoomError) as refused:
        check_room(free, how, predictor, kept_per_frame=3)
    assert refused.value.needed == free + 3 * 49 * 480 * 720


def test_where_nothing_fits_that_is_said(models):
    with pytest.raises(RoomError, match=r"not one frame fits$"):
        check_room(1, plan(CPU), Predictor(models, Request.default(models.variant)))


def test_the_largest_number_that_fits():
    for number in range(20):
        for limit in range(25):
            assert most(number, lambda n, limit=limit: n <= limit) == min(number, limit)


def test_decoding_alone_is_bounded_by_its_pixels(models):
    request = Request.of_decoding(8 * 10**300 + 1, 480, 720)
    with pytest.raises(RoomError, match=r"needs more than"):
        check_room(2**30, plan(CPU, dtype=torch.float32), Predictor(Models(None, None, models.vae), request))
