import pytest

from cogvx_fast.serving.estimate import Estimator
from cogvx_fast.serving.jobs import Job


def request(width=64, height=64, num_frames=17, guidance_scale=6.0):
    return {"width": width, "height": height, "num_frames": num_frames, "guidance_scale": guidance_scale}


def made(steps=10, step=0.5, rest=2.0, **size):
    return request(**size), {"text": rest / 2, "denoise": steps * step, "decode": rest / 2}, steps


def test_a_size_that_was_made_takes_what_it_took():
    estimator = Estimator()
    estimator.learn([made(10, 0.5), made(20, 0.7), made(50, 9.0, rest=2.5)])
    assert estimator.seconds(request(), 30) == pytest.approx(30 * 0.7 + 2.0)
    assert estimator.seconds(request(), 0) == pytest.approx(2.0), "decoding is still to come"


def test_another_size_takes_the_nearest_in_proportion():
    estimator = Estimator()
    estimator.learn([made(step=0.5), made(step=80.0, width=640, height=640)])
    assert estimator.seconds(request(width=128), 10) == pytest.approx(10 * 1.0 + 4.0)
    assert estimator.seconds(request(guidance_scale=1.0), 10) == pytest.approx(10 * 0.25 + 1.0)
    assert estimator.seconds(request(width=640, height=704), 10) == pytest.approx(10 * 88.0 + 2.2)


def test_before_anything_was_made_longer_is_longer():
    estimator = Estimator()
    assert estimator.seconds(request(), 50) > estimator.seconds(request(), 4) > 0


def test_learning_forgets_what_was():
    estimator = Estimator()
    estimator.learn([made(step=5.0)])
    estimator.learn([made(step=0.1)])
    assert estimator.seconds(request(), 10) == pytest.approx(3.0)


def test_before_a_job_was_made_it_goes_by_the_warm_up():
    estimator = Estimator()
    warm = {"request": request(width=32, height=32, num_frames=9), "stage_seconds": {"denoise": 0.1, "decode": 0.2}}
    assert not estimator.knows
    estimator.learn_from([], [warm | {"made_steps": 1}])
    assert estimator.knows
    times = 64 * 64 * 17 / (32 * 32 * 9)
    assert estimator.seconds(request(), 10) == pytest.approx(times * (10 * 0.1 + 0.2))
    assert estimator.seconds(request(guidance_scale=1.0), 10) == pytest.approx(times / 2 * (10 * 0.1 + 0.2))


def test_what_was_made_counts_more_than_the_warm_up():
    size, seconds, steps = made(10, 0.5)
    job = Job("video_1", "", size, result={"stage_seconds": seconds, "made_steps": steps})
    estimator = Estimator()
    estimator.learn_from([job], [{"request": request(), "stage_seconds": {"denoise": 900.0}, "made_steps": 1}])
    assert estimator.seconds(request(), 10) == pytest.approx(10 * 0.5 + 2.0)
