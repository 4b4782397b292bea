"""Steps about whole models: that the operations are right, that a pipeline is, and what its parts take."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cogvx_kernels.targets import target_of
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

from cogvx_fast import FastCogVideoXPipeline, demo_checkpoint
from cogvx_fast.bench.comparison import Comparison
from cogvx_fast.bench.contenders import CONTENDERS
from cogvx_fast.bench.reference import build_pipeline
from cogvx_fast.bench.series import Plan
from cogvx_fast.bench.workloads import WORKLOADS

from .setting import Setting

PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider"]
ROOT = Path(__file__).resolve().parents[2]
# A generation in a process of its own, which prints how many kernels triton compiled, and how many it found.
CHILD = """
import json, sys, torch
from cogvx_fast import EngineConfig, FastCogVideoXPipeline, demo_checkpoint
found = []
try:
    from triton import knobs
    knobs.compilation.listener = lambda src, metadata, metadata_group, times, cache_hit: found.append(cache_hit)
except ImportError:
    pass
pipe = FastCogVideoXPipeline.from_pretrained(
    demo_checkpoint(), torch_dtype=torch.bfloat16, engine=EngineConfig(compile="off")
).to(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
pipe(prompt="a red circle moves right on a white background", num_inference_steps=2)
print(json.dumps({"compiled": found.count(False), "found": found.count(True)}))
"""


def _run(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Exit status and output of a process; 124 if it took longer."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths} | environment,
            capture_output=True,
            text=True,
            timeout=max(seconds, 1),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"took longer than {seconds:.0f} s"
    return done.returncode, (done.stdout + done.stderr).strip()


def right(setting: Setting) -> bool:
    """Every operation on the GPU against fp64, with poisoned outputs: the tests that only a GPU can run."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/test_gpu.py",
    ]
    if importlib.util.find_spec("xdist") is not None and not setting.rehearses:
        command += ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "worksteal"]
    status, output = _run(command, setting.deadline - time.monotonic())
    lines = output.splitlines() or ["no output"]
    for line in [line for line in lines if line.startswith("FAILED")][:20]:
        setting.add(line[:200])
    setting.add("tests/kernels/test_gpu.py", status=status, said=lines[-1][:160])
    return status == 0 or (setting.rehearses and status == 5)  # 5: all of them are skipped


def demo(setting: Setting) -> bool:
    """The demo checkpoint through the whole pipeline beside diffusers, from a cache that was built ahead, sanitized."""
    steps = 2 if setting.rehearses else 20
    latents = {}
    for name, kind in (("diffusers", CogVideoXPipeline), ("ours", FastCogVideoXPipeline)):
        for dtype in (torch.float32, setting.dtype):
            pipe = kind.from_pretrained(demo_checkpoint(), torch_dtype=dtype).to(setting.device)
            pipe.set_progress_bar_config(disable=True)
            given: dict[str, Any] = {"prompt": "a red circle moves right on a white background"}
            given |= {
                "num_inference_steps": steps,
                "output_type": "latent",
                "generator": torch.Generator().manual_seed(0),
            }
            latents[name, dtype] = pipe(**given).frames.float().cpu()
    exact = latents["diffusers", torch.float32]
    errors = {key: float((found - exact).norm() / exact.norm()) for key, found in latents.items()}
    ours, own = errors["ours", setting.dtype], errors["diffusers", setting.dtype]
    setting.add("latents, bf16", error=ours, of_diffusers=own, times=ours / own if own else None)
    setting.add("latents, fp32", error=errors["ours", torch.float32])
    _prebuilt(setting)
    _sanitized(setting)
    return ours <= 1.1 * own and errors["ours", torch.float32] < 1e-3


def _prebuilt(setting: Setting) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if not setting.rehearses:
            build = [sys.executable, "-m", "cogvx_fast", "kernels", "build", "--arch", target_of(setting.device).name]
            build += ["--checkpoint", demo_checkpoint(), "--dtype", "bfloat16", "--out", folder]
            status, output = _run(build, setting.deadline - time.monotonic())
            if status != 0:
                setting.add("prebuilt cache", failed=output.splitlines()[-1][:200] if output else f"status {status}")
                return
        if setting.has_time_for("a generation from the cache"):
            command = [sys.executable, "-c", CHILD, str(setting.device)]
            status, output = _run(command, setting.deadline - time.monotonic(), TRITON_CACHE_DIR=folder)
            last = output.splitlines()[-1] if output else ""
            counts = json.loads(last) if status == 0 and last.startswith("{") else {"failed": last[:200]}
            setting.add("a generation from the cache", **counts)


def _sanitized(setting: Setting) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None or setting.rehearses:
        setting.left_out["compute-sanitizer"] = "it is not here" if tool is None else "a rehearsal"
        return
    if setting.has_time_for("compute-sanitizer"):
        tests = [
            sys.executable,
            "-m",
            "pytest",
            "-o",
            "addopts=",
            "-q",
            "-x",
            "tests/kernels/test_gpu.py",
            "-k",
            "test_operation",
        ]
        status, output = _run([tool, "--error-exitcode", "9", *tests], setting.deadline - time.monotonic())
        lines = [line for line in output.splitlines() if "ERROR SUMMARY" in line or "passed" in line]
        setting.add("compute-sanitizer", status=status, said=" ".join(lines)[:200])


def _compare(setting: Setting, name: str, contenders: list[str]) -> bool:
    """Rows of the bench for a workload, beside one another; whether none was wrong."""
    if not setting.has_time_for(name):
        return True
    workload = WORKLOADS[name].rehearsal() if setting.rehearses else WORKLOADS[name]
    command = f"python benchmarks/first_gpu.py {setting.step}"
    reasons = {one: CONTENDERS[one].why_not(setting.device, workload) for one in contenders}
    setting.left_out |= {f"{name} {one}": why for one, why in reasons.items() if why is not None}
    able = [one for one, why in reasons.items() if why is None]
    plan = Plan(workload, "bfloat16", str(setting.device), command, able)
    rows = Comparison.run(plan)
    for row in rows:
        found = {"p50_seconds": row.p50_seconds, "first_seconds": row.first_call_seconds, "gate": row.gate}
        peak = None if row.peak_memory_bytes is None else row.peak_memory_bytes / 2**30
        setting.add(f"{name} {row.stage} {row.contender}", **found, peak_gib=peak, detail=row.gate_detail[:120])
    return all(row.gate != "red" for row in rows)


def dit(setting: Setting) -> bool:
    """A denoising step of 2b, 5b and 1.5: ours with and without compile, with each attention, and diffusers."""
    names = ("dit-2b-full", "dit-5b-full", "dit-1.5-full")
    skipped = ("diffusers-compile",) if setting.rehearses else ()  # minutes of C++
    wanted = {name: [one for one in WORKLOADS[name].contenders or () if one not in skipped] for name in names}
    return all([_compare(setting, name, wanted[name]) for name in names])


def vae(setting: Setting) -> bool:
    """The autoencoder at 49 x 480 x 720: our convolutions or cuDNN's, and what is allocated against what is planned."""
    return _compare(setting, "vae-full", ["diffusers", "ours", "ours-cudnn-conv"])


def whole(setting: Setting) -> bool:
    """A whole generation of 2b with random weights, 50 steps, exact and balanced, beside the 90 s of an A100."""
    steps, right = (2 if setting.rehearses else 50), True
    parts = [WORKLOADS[name] for name in ("dit-2b-full", "vae-full")]
    of_transformer, of_vae = (part.rehearsal() if setting.rehearses else part for part in parts)
    workload = dataclasses.replace(of_transformer, vae=of_vae.vae)
    for engine in ("exact", "balanced"):
        if not setting.has_time_for(engine):
            continue

        def generate(engine: str = engine) -> dict[str, Any]:
            pipe = build_pipeline(workload, setting.dtype, setting.device)
            config = pipe.transformer.config
            fast = FastCogVideoXPipeline(
                None, None, pipe.vae, pipe.transformer, CogVideoXDDIMScheduler(), engine=engine
            ).to(setting.device)
            fast.set_progress_bar_config(disable=True)
            prompt = setting.normal(1, config.max_text_seq_length, config.text_embed_dim)
            given = {"prompt_embeds": prompt, "negative_prompt_embeds": torch.zeros_like(prompt), "output_type": "pt"}
            given |= {"num_frames": workload.num_frames, "height": workload.height, "width": workload.width}
            given |= {"num_inference_steps": steps}
            on_gpu = setting.device.type == "cuda"
            fast(**given | {"num_inference_steps": 2})  # compiles and tunes
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(setting.device)
            began = time.monotonic()
            frames = fast(**given).frames
            finite = bool(frames.isfinite().all())  # waits for the GPU
            found: dict[str, Any] = {"seconds": time.monotonic() - began, "steps": steps, "finite": finite}
            if on_gpu:
                found["peak_gib"] = torch.cuda.max_memory_allocated(setting.device) / 2**30
            return found

        with contextlib.suppress(ValueError):
            right &= setting.tried(engine, generate)
    setting.add("diffusers as published, an A100, fp16", seconds=90.0, said="another GPU; from the model's own page")
    return right
