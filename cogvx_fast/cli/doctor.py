"""`cogvx-fast doctor`: what is installed, what the machine can do, and what would help."""

from __future__ import annotations

import importlib.util
import json
import platform
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from cogvx_fast import machine
from cogvx_fast.quiet import quiet_imports

from .console import UsageError, exit_codes, results, say
from .generate import Precision

PACKAGES = ("torch", "triton", "diffusers", "transformers", "torchao")

COMPONENTS = {
    "text_encoder": "text encoder",
    "transformer": "transformer",
    "vae": "autoencoder",
    "packed": "copies of weights",
    "tables": "tables and buffers",
    "activations": "activations of a step",
}


@dataclass(frozen=True)
class Backend:
    """Something optional: the module to look for, the package it comes in, what it gives and how to get it."""

    module: str
    package: str
    gives: str
    install: str


BACKENDS = {
    "flash-attn": Backend(
        "flash_attn",
        "flash-attn",
        "exact attention kernels for NVIDIA GPUs (fp16, bf16)",
        'pip install "cogvx_fast[flash]"',
    ),
    "xformers": Backend(
        "xformers", "xformers", "exact memory-efficient attention for NVIDIA GPUs", 'pip install "cogvx_fast[xformers]"'
    ),
    "sageattention": Backend(
        "sageattention", "sageattention", "int8 attention kernels for NVIDIA GPUs (lossy)", "pip install sageattention"
    ),
    "peft": Backend("peft", "peft", "LoRA weights: pipe.load_lora_weights(...)", "pip install peft"),
    "openai": Backend(
        "openai",
        "openai",
        "prompts rewritten by a language model behind an address: generate --enhance",
        'pip install "cogvx_fast[enhance]"',
    ),
    "matplotlib": Backend("matplotlib", "matplotlib", "plots of benchmark results", 'pip install "cogvx_fast[plots]"'),
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For machines: print one JSON object.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Plan the memory of this checkpoint: a folder or Hub id.", show_default=False),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Plan the memory of videos of this height, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Their width, in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Their number of frames.")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Precision of the plan.", show_default="the model's")] = None,
    device: Annotated[str | None, typer.Option(help="Device of the plan.", show_default="the best there is")] = None,
    vae_memory: Annotated[
        str | None, typer.Option(help="What the autoencoder's frames may take, such as 4GiB.", show_default=False)
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Plan quantized weights: balanced, int8, int8-weight, fp8, fp8-weight.", show_default=False),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="What a video may take in all, such as 8GiB: shows how it would be made to fit.", show_default=False
        ),
    ] = None,
) -> None:
    """Show versions, devices with their capabilities, optional backends, and what a video of some size will take."""
    with exit_codes():
        memory = None
        budgets = vae_memory, recipe, memory_limit
        if any(value is not None for value in (model, height, width, frames, dtype, device, *budgets)):
            memory = _plan_memory(model, height, width, frames, dtype and dtype.value, device, *budgets)
        report = examine()
        if memory is not None:
            report["memory"] = memory
        if as_json:
            say(results, json.dumps(report, indent=2))
        else:
            _show(report)


def _plan_memory(
    model: str | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    dtype: str | None,
    device: str | None,
    budget: str | None,
    recipe: str | None,
    limit: str | None,
) -> dict[str, Any]:
    from . import loading, validate
    from .checkpoint import Checkpoint, read_checkpoint
    from .prediction import model_memory, request_of, room_error, vae_memory

    if recipe is not None and model is None:
        raise UsageError("--recipe", repr(recipe), "needs --model, whose layers it names")
    if limit is not None and model is None:
        raise UsageError("--memory-limit", repr(limit), "needs --model, whose weights count")
    found = None if model is None else read_checkpoint(model)
    planned = found or Checkpoint("the family")
    pixels = validate.video_size(height, width, planned.variant)
    num_frames = validate.num_frames(frames, planned.variant)
    chosen = loading.choose_device(device)
    chosen_dtype = loading.choose_dtype(dtype, chosen, planned)
    with quiet_imports():
        from cogvx_fast import EngineConfig
        from cogvx_fast.memory import Request
        from cogvx_fast.vae.chunks import BEYOND_MEMORY

    try:
        config = EngineConfig(recipe=recipe, vae_memory=budget, memory_limit=limit)
    except ValueError:  # said by name below
        config = EngineConfig()
    decoding = Request.of_decoding(num_frames, *pixels)
    request = decoding if found is None else request_of(found, *pixels, num_frames)
    too_much = room_error(found, request, chosen_dtype, chosen, config)
    if too_much is not None and too_much.needed >= BEYOND_MEMORY:
        raise validate.too_large(frames, height, width, planned, too_much)
    memory = vae_memory(found, *pixels, num_frames, chosen_dtype, chosen, budget)
    if found is not None:
        memory["models"] = model_memory(found, request, chosen_dtype, chosen, recipe, budget, limit)
    memory["problem"] = None if too_much is None else str(too_much)
    return memory


def examine() -> dict[str, Any]:
    """Everything `doctor` shows: `versions`, `cpu`, `cuda` (a list), `mps`, `backends`. Memory is in bytes.

    Optional packages are looked up, never imported: some of them fail or take long on import.
    """
    from cogvx_fast import __version__

    versions: dict[str, str | None] = {"cogvx_fast": __version__, "python": platform.python_version()}
    versions |= {package: machine.installed_version(package) for package in PACKAGES}
    return {
        "versions": versions,
        "cpu": machine.cpu(),
        "cuda": machine.cuda_devices(),
        "mps": machine.has_mps(),
        "backends": {name: _look_up(backend) for name, backend in BACKENDS.items()}
        | {"libx264": _look_up_h264()}
        | _look_up_cpu_kernels(),
        "compiled": _look_up_compiled(),
    }


def _look_up(backend: Backend) -> dict[str, Any]:
    found = importlib.util.find_spec(backend.module) is not None
    return {
        "found": found,
        "version": machine.installed_version(backend.package) if found else None,
        "gives": backend.gives,
        "install": backend.install,
    }


def _look_up_cpu_kernels() -> dict[str, dict[str, Any]]:
    """Our own C++ for CPUs, all of it compiled here if it was not yet: some seconds."""
    from cogvx_kernels import ops

    def why_not(impl: str, *operations: str) -> str | None:
        return next(filter(None, [ops.why_unavailable(operation, impl) for operation in operations]), None)

    kernels = {
        "C++ operations": (
            why_not("cpu", "layer_norm_modulate", "qk_norm_rope", "group_norm_statistics", "bias_gelu"),
            "norms, gates and rotations in one pass each",
        ),
        "C++ convolutions": (
            why_not("winograd", "packed_conv3d") or why_not("direct", "packed_conv3d"),
            "the autoencoder's convolutions with fewer products, and sums that round little",
        ),
        "C++ int8 rows": (
            why_not("cpu", "quantize_rows"),
            "what is before and after int8 products, in one pass each",
        ),
        "AMX attention": (
            ops.why_unavailable("attention", "amx"),
            "exact bf16 attention, twice as fast as torch's",
        ),
        "AVX-512 attention": (
            ops.why_unavailable("attention", "avx512"),
            "the same without AMX, two and a half times as fast",
        ),
    }
    return {
        name: {"found": reason is None, "version": None, "gives": gives, "install": _what_helps(reason or "")}
        for name, (reason, gives) in kernels.items()
    }


def _what_helps(reason: str) -> str:
    return f"install a C++ compiler: {reason}" if reason.startswith("no C++ compiler") else reason


def _look_up_compiled() -> dict[str, str | None]:
    """Where that C++ is kept; if not where it should be, why."""
    from cogvx_kernels import ops

    try:
        folder, problem = ops.compiled_folder()
    except OSError as error:
        return {"folder": None, "problem": f"no folder can be written: {error}"}
    return {"folder": str(folder), "problem": problem}


def _look_up_h264() -> dict[str, Any]:
    from cogvx_fast.video import why_no_h264

    problem = why_no_h264()
    version = machine.installed_version("av")
    return {
        "found": problem is None,
        "version": None if version is None else f"PyAV {version}",
        "gives": "MP4 output (H.264)",
        "install": "" if problem is None else f"{problem[1]}: {problem[0]}",
    }


def _show(report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    versions = Table("package", "version", title="Versions", title_justify="left")
    for name, version in report["versions"].items():
        versions.add_row(name, version or "not installed")
    results.print(versions)

    devices = Table("device", "name", "can", "size", title="Devices", title_justify="left")
    for gpu in report["cuda"]:
        can = f"capability {gpu['capability']}: {', '.join(gpu['features'])}"
        devices.add_row(gpu["device"], gpu["name"], can, f"{_gib(gpu['memory'])}, {gpu['multiprocessors']} SMs")
    if report["mps"]:
        devices.add_row("mps", "Apple GPU", "", "")
    cpu = report["cpu"]
    devices.add_row(
        "cpu",
        cpu["name"],
        f"{', '.join(cpu['features']) or 'no known extension'}; torch uses {cpu['torch_capability']}",
        f"{_gib(cpu['memory'])}, {_gib(cpu['memory_available'])} free; "
        f"{cpu['cores']} cores, {cpu['torch_threads']} threads",
    )
    results.print(devices)
    if not report["cuda"]:
        results.print("No CUDA device found: the pipelines run on the CPU, and GPU kernels are not used.")

    backends = Table("backend", "found", title="Optional backends", title_justify="left")
    backends.add_column("gives", overflow="fold")
    backends.add_column("get it with", overflow="fold")
    for name, backend in report["backends"].items():
        found = (backend["version"] or "yes") if backend["found"] else "no"
        # Cells are read as markup, which would swallow the brackets of "cogvx_fast[flash]".
        install = "" if backend["found"] else escape(backend["install"])
        backends.add_row(name, found, backend["gives"], install)
    results.print(backends)
    compiled = report["compiled"]
    if compiled["problem"]:
        where = f"in {compiled['folder']}" if compiled["folder"] else "nowhere"
        results.print(f"Compiled C++ is kept {where}: {compiled['problem']}.", markup=False, highlight=False)
    if "memory" in report:
        _show_memory(report["memory"])


def _show_memory(memory: dict[str, Any]) -> None:
    from rich.table import Table

    size = f"{memory['num_frames']} frames of {memory['width']}x{memory['height']}"
    title = f"Memory of the autoencoder's layers, predicted: {size}, {memory['dtype']}, {memory['device']}"
    table = Table("use", "peak", "plan", title=title, title_justify="left")
    for use, plan in memory["plans"].items():
        table.add_row(use, f"{plan['peak'] / 2**30:.2f} GiB", plan["plan"])
    results.print(table)
    if "models" in memory:
        models = memory["models"]
        title = f"Memory of the models, predicted: recipe {models['recipe'] or 'none'}, {size}"
        table = Table("component", "size", title=title, title_justify="left")
        for component, name in COMPONENTS.items():
            table.add_row(name, f"{models[component] / 2**30:.3f} GiB")
        for stage, size in models["stages"].items():
            table.add_row(f"in all, stage {stage!r}", f"{size / 2**30:.3f} GiB")
        results.print(table)
        if "choice" in models:
            results.print(f"With a limit of {models['choice']}", markup=False, highlight=False)
    if memory["problem"] is not None:
        say(results, f"This is more than there is: {memory['problem']}")


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
