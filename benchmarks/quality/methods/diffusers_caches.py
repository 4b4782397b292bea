"""The caches that diffusers ships, through `transformer.enable_cache`, brought to K evaluations' worth of work."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from cogvx_fast.family import latent_frames

from . import magcache
from .counting import attention_work, block_work, feed_forward_work
from .method import DIFFUSERS, Job, Method, Prepared, Unreachable
from .periodic import FIRST, LAST

Parameters = dict[str, Any]
TOLERANCE = 1.0  # evaluations that a cache's work may be away from K; a row states its real work
_TRIALS = 9  # generations at most to find a threshold


def _cached(
    name: str, what: str, find: Callable[[Any, Job], Parameters], config: Callable[[Any, Job, Parameters], Any]
) -> Method:
    @contextlib.contextmanager
    def apply(pipe: Any, job: Job, parameters: Parameters) -> Iterator[Prepared]:
        pipe.transformer.enable_cache(config(pipe, job, parameters))
        try:
            yield Prepared(pipe, {"num_inference_steps": job.steps})
        finally:
            pipe.transformer.disable_cache()

    return Method(name, what, DIFFUSERS, find, apply, block_work)


def _nearest(name: str, job: Job, candidates: Iterable[tuple[float, tuple, Parameters]]) -> Parameters:
    """Of (evaluations, how far from the usual, parameters) the nearest to K, to a quarter; then the most usual."""
    found = list(candidates)

    def rank(candidate: tuple[float, tuple, Parameters]) -> tuple:
        away = abs(candidate[0] - job.evaluations)
        return (max(0, math.ceil(4 * away) - 1), candidate[1], away)

    evaluations, _, parameters = min(found, key=rank)
    if abs(evaluations - job.evaluations) > TOLERANCE:
        least = min(candidate[0] for candidate in found)
        raise Unreachable(
            f"{name} cannot be brought to {job.evaluations} evaluations of {job.steps}: the nearest is"
            f" {evaluations:.1f} and the least {least:.1f}, as what it skips is a part of each step's work"
        )
    return parameters


# --- first block cache ---------------------------------------------------------------------------


def _first_block_config(pipe: Any, job: Job, parameters: Parameters) -> FirstBlockCacheConfig:
    return FirstBlockCacheConfig(threshold=parameters["threshold"])


def _find_first_block(pipe: Any, job: Job) -> Parameters:
    """By generations of the first batch: which steps are skipped depends on what is generated."""
    layers = len(pipe.transformer.transformer_blocks)
    least = job.steps / layers + 1 - 1 / layers
    if least > job.evaluations + TOLERANCE:
        raise Unreachable(
            f"first block cache computes one of {layers} blocks at every step and all at the first: at least"
            f" {least:.1f} evaluations of {job.steps}"
        )
    trials: list[list[float]] = job.known.setdefault(f"first block cache, {job.steps} steps", [])

    def away(trial: list[float]) -> float:
        return abs(trial[1] - job.evaluations)

    for _ in range(_TRIALS):
        low = max((threshold for threshold, found in trials if found > job.evaluations), default=1e-3)
        high = min((threshold for threshold, found in trials if found <= job.evaluations), default=4.0)
        step = 1 - 1 / layers  # what one step more or less costs
        if (trials and away(min(trials, key=away)) < step / 2) or high < low * 1.002:
            break
        threshold = math.sqrt(low * high)
        with block_work(pipe) as work, FIRST_BLOCK.apply(pipe, job, {"threshold": threshold}) as ready:
            job.trial(pipe, **ready.arguments)
        trials.append([threshold, work.evaluations])
    return {"threshold": min(trials, key=away)[0]}


FIRST_BLOCK = _cached(
    "first block cache (diffusers)",
    "all blocks but the first, by the change of its residual",
    _find_first_block,
    _first_block_config,
)


# --- MagCache ------------------------------------------------------------------------------------


def _mag_config(pipe: Any, job: Job, parameters: Parameters) -> MagCacheConfig:
    return MagCacheConfig(
        threshold=parameters["threshold"],
        max_skip_steps=job.steps,
        retention_ratio=magcache.RETENTION,
        num_inference_steps=job.steps,
        mag_ratios=parameters["ratios"],
    )


MAG = _cached(
    "MagCache (diffusers)",
    "the stack's residual, by measured ratios of its length",
    lambda pipe, job: magcache.find(pipe, job, DIFFUSERS),
    _mag_config,
)


# --- TaylorSeer ----------------------------------------------------------------------------------


def _taylor_steps(steps: int, interval: int, first: int, last: int) -> list[int]:
    """The steps that diffusers' hook computes: warm-up, every `interval`-th from the second after it, cool-down."""
    return [i for i in range(steps) if i < first or (i - first - 1) % interval == 0 or i >= last]


def _find_taylor(pipe: Any, job: Job) -> Parameters:
    """Warm-up and cool-down as near to those of the periodic rules as K allows."""
    candidates = []
    for interval in range(1, job.steps + 1):
        for first in range(2, min(9, job.steps)):
            for last in range(max(0, job.steps - 6), job.steps + 1):
                count = len(_taylor_steps(job.steps, interval, first, last))
                unusual = (abs(first - FIRST) + abs(job.steps - last - LAST),)
                candidates.append((float(count), unusual, {"interval": interval, "first": first, "last": last}))
    return _nearest("TaylorSeer", job, candidates)


def _taylor_config(parameters: Parameters, **changes: Any) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(
        cache_interval=parameters["interval"],
        disable_cache_before_step=parameters["first"],
        disable_cache_after_step=parameters["last"],
        max_order=1,
        taylor_factors_dtype=torch.float32,
        **changes,
    )


TAYLOR = _cached(
    "TaylorSeer (diffusers)",
    "attention and feed-forward of every block, extrapolated",
    _find_taylor,
    # Its own choice of modules, "attn" at the end of a name, fits none of CogVideoX's, which are called attn1.
    lambda pipe, job, parameters: _taylor_config(
        parameters, cache_identifiers=[r"transformer_blocks\.\d+\.attn1", r"transformer_blocks\.\d+\.ff"]
    ),
)
TAYLOR_LITE = _cached(
    "TaylorSeer lite (diffusers)",
    "the network's output, extrapolated",
    _find_taylor,
    lambda pipe, job, parameters: _taylor_config(parameters, use_lite_mode=True),
)


# --- caches of attention and of the unconditional half -------------------------------------------


def _attention_share(transformer: Any) -> float:
    """The part of a block's work that its attention is, at the checkpoint's own size."""
    config = transformer.config
    patch, frames = config.patch_size, latent_frames(config.sample_frames)
    tokens = (
        math.ceil(frames / (config.patch_size_t or 1))
        * (config.sample_height // patch)
        * (config.sample_width // patch)
    )
    tokens += config.max_text_seq_length
    block = transformer.transformer_blocks[0]
    dim, inner = block.attn1.to_q.in_features, block.attn1.to_q.out_features
    attention = attention_work(tokens, dim, inner)
    return attention / (attention + feed_forward_work(tokens, dim, block.ff.net[0].proj.out_features))


def _timesteps(pipe: Any, steps: int) -> list[float]:
    pipe.scheduler.set_timesteps(steps)
    return [float(t) for t in pipe.scheduler.timesteps]


def _find_pyramid(pipe: Any, job: Job) -> Parameters:
    """Its range of two and its end of t = 100 where they reach K, else wider ranges down to t = 0."""
    share, times = _attention_share(pipe.transformer), _timesteps(pipe, job.steps)

    def candidates() -> Iterator[tuple[float, tuple, Parameters]]:
        for every in (2, 3, 4, 5, 6, 8, 10):
            for end in (100, -1):
                for start in range(1, job.steps):
                    highest = times[start] + 0.5
                    skipped = sum(end < t < highest and i % every != 0 for i, t in enumerate(times))
                    parameters = {"every": every, "timesteps": [end, highest]}
                    yield job.steps - share * skipped, (every, end == -1), parameters

    return _nearest("Pyramid Attention Broadcast", job, candidates())


def _pyramid_config(pipe: Any, job: Job, parameters: Parameters) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=parameters["every"],
        spatial_attention_timestep_skip_range=tuple(parameters["timesteps"]),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


PYRAMID = _cached("Pyramid Attention Broadcast (diffusers)", "attention reused", _find_pyramid, _pyramid_config)


def _find_faster(pipe: Any, job: Job) -> Parameters:
    """The unconditional half every fifth step and attention every second, where they reach K from some step on."""
    share, times = _attention_share(pipe.transformer), _timesteps(pipe, job.steps)

    def work(unconditional: int, attention: int, highest: float) -> float:
        total = 0.0
        for i, t in enumerate(times):
            half = i > 0 and t < highest and i % unconditional != 0
            reused = half and i % attention != 0  # diffusers skips attention in steps of one half alone
            total += (0.5 if half else 1.0) * (1 - share if reused else 1.0)
        return total

    candidates = (
        (
            work(unconditional, attention, times[start] + 0.5),
            (unconditional, attention),
            {"unconditional": unconditional, "attention": attention, "below": times[start] + 0.5},
        )
        for unconditional in (5, 8, 10)
        for attention in (2, 3, 4, 5, 8, 10)
        for start in range(1, job.steps)
    )
    return _nearest("FasterCache", job, candidates)


def _faster_config(pipe: Any, job: Job, parameters: Parameters) -> FasterCacheConfig:
    """Weights and their ranges as diffusers' example for CogVideoX-5b has them."""
    timesteps = (-1, parameters["below"])
    return FasterCacheConfig(
        spatial_attention_block_skip_range=parameters["attention"],
        spatial_attention_timestep_skip_range=timesteps,
        unconditional_batch_skip_range=parameters["unconditional"],
        unconditional_batch_timestep_skip_range=timesteps,
        low_frequency_weight_update_timestep_range=(99, 641),
        high_frequency_weight_update_timestep_range=(-1, 301),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep,
        tensor_format="BFCHW",
    )


FASTER = _cached(
    "FasterCache (diffusers)",
    "attention extrapolated, and the unconditional half from the conditional",
    _find_faster,
    _faster_config,
)

CACHES = (FIRST_BLOCK, MAG, TAYLOR, TAYLOR_LITE, FASTER, PYRAMID)
