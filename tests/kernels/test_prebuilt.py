"""What is compiled ahead of time is what run time looks up, and a cache that will not be found is told from one."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cogvx_kernels._triton import why_unavailable

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)

import triton
from cogvx_kernels import aot, checks
from cogvx_kernels._triton import tuned
from cogvx_kernels._triton.tuned import TunedKernel, gpu_target
from cogvx_kernels.aot import farm, models, prebuilt
from cogvx_kernels.targets import TARGETS
from diffusers import AutoencoderKLCogVideoX
from triton import knobs
from triton.runtime import driver

from cogvx_fast.config import AttentionBackend
from cogvx_fast.plan import AttentionPlan, Product, VaePlan
from cogvx_fast.quantization import RECIPES
from cogvx_fast.quantization.apply import quantize_transformer
from cogvx_fast.session import EngineSession
from cogvx_fast.vae import FastAutoencoderKLCogVideoX
from tests import toy
from tests.generation import fast_model, forward_inputs, plan, session

pytestmark = pytest.mark.slow

TARGET, VERSION = "sm_90", "1.2.3"
OF_A_STEP = [
    "layer_norm_modulate",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "qk_norm_rope",
    "attention",
]


class DryDriver(aot._NoDevice):
    """A GPU on which every launch succeeds and computes nothing, and every configuration takes equally long."""

    def __init__(self, target):
        super().__init__(target)
        self.launched = []
        self.launcher_cls = lambda source, metadata: lambda *_: self.launched.append(metadata.hash)
        properties = {"max_shared_mem": 1 << 20}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties, load_binary=lambda *_: (object(), object(), 0, 0, 1024)
        )

    def get_current_device(self):
        return "dry"  # nothing that was compiled for another is in memory: all is looked up

    def get_benchmarker(self):
        return lambda call, quantiles: [call(), 1.0, 1.0, 1.0][1:]


@pytest.fixture
def dry_run(monkeypatch):
    """Launches end here; gives what was launched, and what was looked up in triton's cache: folder to "was found"."""
    device, looked_up = DryDriver(gpu_target(TARGETS[TARGET])), {}
    folders = {}

    def listen(src, metadata, metadata_group, times, cache_hit):
        folder = Path(next(iter(metadata_group.values()))).parent.name
        looked_up[folder] = cache_hit
        folders[metadata["hash"]] = folder

    def tuner(kernel, _):  # as on a GPU, where all configurations are timed
        return triton.autotune(list(kernel.for_target(TARGETS[TARGET])), key=list(kernel.key))(kernel.fn)

    monkeypatch.setattr(knobs.compilation, "listener", listen)
    monkeypatch.setattr(checks, "INTERPRETED", True)  # tensors may be on a CPU
    monkeypatch.setattr(TunedKernel, "tuner", tuner)
    before = driver._active
    driver.set_active(device)
    yield SimpleNamespace(launched=lambda: {folders[key] for key in device.launched}, looked_up=looked_up)
    driver.set_active(before)
    for kernel in TunedKernel.all():
        kernel.fn.device_caches.pop("dry", None)


def first(kernel, _):
    return triton.autotune(list(kernel.for_target(TARGETS[TARGET]))[:1], key=[])(kernel.fn)


@torch.no_grad()
def generate(variant, dtype, batch, backend=AttentionBackend.TRITON, recipe=None):
    """A step as the engine makes it on a GPU; the numbers are garbage, as nothing is computed between the products."""
    model = fast_model(variant, attention_head_dim=64, num_layers=1).to(dtype)
    product = Product.CUBLASLT
    if recipe is not None:
        quantize_transformer(model, RECIPES[recipe])
        product = Product.SCALED
    fallback = backend if recipe is None else AttentionBackend.SDPA
    changes = {"operations": "triton", "attention": AttentionPlan(backend, fallback), "product": product}
    inputs = forward_inputs(model, batch=batch, dtype=dtype)
    with session(model, 2, plan=plan(model, changes, recipe=recipe)).active() as generation:
        model(**inputs | {"timestep": generation.scheduler.timesteps[0].expand(batch)})
        model(**inputs)  # the modulation of each sample by itself
    assert generation.ran.counts["modulation"] == generation.ran.counts["bindings"] == 1
    assert generation.ran.fast == 2


MODELS = [("2b", torch.float16), pytest.param(("1.5-5b", torch.bfloat16), marks=pytest.mark.kernels_all)]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def built(request):
    """A variant, its dtype, and what is compiled ahead of time for it."""
    variant, dtype = request.param
    model = models.Model(2, 64, str(dtype).removeprefix("torch."), variant != "2b", tokens=12, text_length=16)
    # A model's launches begin with those of a step; the same kernels come again in 8 bits.
    jobs = [job for job in farm.jobs(model, [TARGET], kernels=OF_A_STEP) if job.launch < len(OF_A_STEP)]
    entries = [entry for _, entry in farm.run(jobs, prebuilt.entry, 1)]
    return variant, dtype, entries


def test_run_time_looks_up_what_was_built(built, dry_run):
    variant, dtype, entries = built
    assert len(entries) >= 10
    for batch in (2, 1):
        generate(variant, dtype, batch)
    assert dry_run.looked_up and all(dry_run.looked_up.values()), "something was compiled at run time"
    built_ahead = {entry.folder for entry in entries}
    assert set(dry_run.looked_up) == built_ahead, "something was built that run time does not look up"
    assert dry_run.launched() == built_ahead


@pytest.fixture(scope="module")
def built_in_8_bits():
    """The folders of what is compiled ahead of time, of each kernel the first configuration."""
    model = models.Model(2, 64, "float16", True, tokens=12, text_length=16)
    of_a_step = {*OF_A_STEP, "quantize_rows", "scaled_linear", "qk_norm_rope_int8", "int8_attention"}
    jobs = farm.jobs(model, [TARGET], kernels=of_a_step, first=True)
    return {entry.folder for _, entry in farm.run(jobs, prebuilt.entry, 1)}


@pytest.mark.kernels_all
def test_a_step_in_8_bits_looks_up_what_was_built(built_in_8_bits, dry_run, monkeypatch):
    monkeypatch.setattr(TunedKernel, "tuner", first)
    for batch in (2, 1):
        generate("5b", torch.float16, batch, AttentionBackend.TRITON_INT8, "int8")
    assert len(dry_run.looked_up) == 9 - 1 + 1  # the last block's addition, and no kernel twice
    assert all(dry_run.looked_up.values()) and set(dry_run.looked_up) <= built_in_8_bits


def test_the_dry_run_sees_what_was_not_built(built, dry_run, monkeypatch, tmp_path):
    variant, dtype, _ = built
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(TunedKernel, "tuner", first)
    generate(variant, dtype, 2)
    assert dry_run.looked_up and not any(dry_run.looked_up.values())


class Grids:
    """What stands for a kernel: one function, whatever the grid."""

    def __init__(self, run):
        self.run = run

    def __getitem__(self, grid):
        return self.run


def chosen(fn, arguments):
    """What a launch chooses a binary by: constants, and which pointers there are."""
    return fn.__name__, frozenset((name, value) for name, value in arguments.items() if value is None or name.isupper())


@torch.no_grad()
def test_an_autoencoder_launches_what_is_listed_for_its_channels(monkeypatch):
    channels, groups, doublings = (8, 16, 24), 4, 1
    down, up = ((f"CogVideoX{way}Block3D",) * len(channels) for way in ("Down", "Up"))
    vae = FastAutoencoderKLCogVideoX.adopt(
        AutoencoderKLCogVideoX(
            block_out_channels=channels,
            down_block_types=down,
            up_block_types=up,
            norm_num_groups=groups,
            layers_per_block=1,
            temporal_compression_ratio=2**doublings,
        ).half()
    )
    listed = models.vae_launches(torch.float16, models.Autoencoder(channels, 16, groups, doublings))
    launched = set()

    def wrap(tuner):
        def run(*given, **named):
            names = (name for name in tuner.fn.arg_names if name not in TunedKernel.of(tuner).parameters)
            launched.add(chosen(tuner.fn, dict(zip(names, given, strict=False)) | named))

        return Grids(run)

    monkeypatch.setattr(tuned, "wrap_triton", wrap)
    monkeypatch.setattr(checks, "INTERPRETED", True)  # tensors may be on a CPU
    on_gpu = VaePlan(torch.device("cpu"), torch.float16, operations="triton", convolution="triton")
    changed = dataclasses.replace(plan(toy.transformer()), vae=on_gpu)
    with EngineSession(changed, None, vae).active():
        latents = vae.encode(torch.zeros(1, 3, 5, 16, 16, dtype=torch.float16)).latent_dist.mode()
        vae.decode(torch.zeros_like(latents))
    assert launched == {chosen(launch.kernel.fn, launch.arguments) for launch in listed}


@pytest.fixture(scope="module")
def entry():
    model = models.Model(2, 64, "float16", False, tokens=12, text_length=16)
    job = farm.jobs(model, ["sm_80"], ["gated_residual"], first=True)
    ((_, entry),) = farm.run(job, prebuilt.entry, 1)
    return entry


@pytest.fixture
def cache(tmp_path, entry):
    """A cache of one kernel, as if it had been built in this folder, and its manifest."""
    shutil.copytree(Path(knobs.cache.dir) / entry.folder, tmp_path / entry.folder)
    manifest = prebuilt.Manifest.here(VERSION, ["sm_80"], [{"heads": 2}], [entry])
    for path, content in prebuilt.relocate(tmp_path, manifest).items():
        path.write_text(content)
    (tmp_path / prebuilt.MANIFEST).write_text(manifest.to_json())
    return tmp_path


def problems(cache):
    return prebuilt.problems(cache, prebuilt.read(cache), VERSION)


def test_a_whole_cache_has_no_problems(cache):
    assert problems(cache) == []


def test_missing_and_damaged_files_are_named(cache, entry):
    folder = cache / entry.folder
    (folder / "gated_residual_kernel.cubin").write_bytes(b"")
    assert problems(cache) == ["gated_residual sm_80 ROWS 2, 8 warps: not as it was built: gated_residual_kernel.cubin"]
    (folder / "gated_residual_kernel.json").unlink()
    assert problems(cache) == ["gated_residual sm_80 ROWS 2, 8 warps: missing: gated_residual_kernel.json"]
    shutil.rmtree(folder)
    assert "missing: " in problems(cache)[0]


def test_a_moved_cache_is_seen_and_mended(cache, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "cache"
    shutil.move(cache, moved)
    assert "it was moved" in problems(moved)[0]
    for path, content in prebuilt.relocate(moved, prebuilt.read(moved)).items():
        path.write_text(content)
    assert problems(moved) == [] and not prebuilt.relocate(moved, prebuilt.read(moved))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"triton": "0"}, "built by triton 3"),
        ({"backends": {"sm_80": "ptxas 1"}}, "sm_80: built by another ptxas"),
        ({"environment": {"DISABLE_LLVM_OPT": "1"}}, "built with the environment {'DISABLE_LLVM_OPT': '1'}"),
    ],
)
def test_other_versions_are_seen(cache, change, message):
    manifest = dataclasses.replace(prebuilt.read(cache), **change)
    (found,) = prebuilt.problems(cache, manifest, VERSION)
    assert message in found


def test_another_source_of_a_kernel_is_seen(cache, entry):
    manifest = prebuilt.read(cache)
    manifest = dataclasses.replace(manifest, entries=[dataclasses.replace(entry, source="0")])
    (found,) = prebuilt.problems(cache, manifest, "9.9")
    assert (
        found == f"gated_residual: the kernel's source has changed since (cogvx_fast {VERSION} built it, here is 9.9)"
    )


def test_builds_add_up_unless_the_versions_changed(cache, entry):
    first = prebuilt.read(cache)
    other = dataclasses.replace(entry, folder="OTHER")
    second = prebuilt.Manifest.here(VERSION, ["sm_90"], [{"heads": 4}], [other])
    both = second.merged(first)
    assert [e.folder for e in both.entries] == [entry.folder, "OTHER"] and set(both.backends) == {"sm_80", "sm_90"}
    assert both.models == [{"heads": 2}, {"heads": 4}]
    assert second.merged(dataclasses.replace(first, triton="0")) == second
    assert second.merged(None) == second


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not there"), ("{", "cannot be read"), ("[]", "cannot be read"), ('{"schema": 99}', "another schema")],
)
def test_a_manifest_that_is_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / prebuilt.MANIFEST).write_text(content)
    with pytest.raises(prebuilt.ManifestError, match=message):
        prebuilt.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder": "../outside"}, r"'\.\./outside' must be the name of a folder or file in the cache"),
        ({"folder": ".."}, r"'\.\.' must be the name"),
        ({"folder": "/outside"}, "'/outside' must be the name"),
        ({"files": {"../outside": "0"}}, r"'\.\./outside' must be the name"),
        ({"files": {"a.cubin": 0}}, "0 must be text"),
        ({"kernel": []}, r"\[\] must be text"),
    ],
)
def test_a_manifest_that_leads_out_of_the_cache_is_refused(cache, changes, message):
    content = json.loads((cache / prebuilt.MANIFEST).read_text())
    content["entries"][0] |= changes
    (cache / prebuilt.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(prebuilt.ManifestError, match=message):
        prebuilt.read(cache)


@pytest.mark.parametrize("changes", [{"versions": {}}, {"backends": {"sm_80": 1}}, {"backends": []}, {"triton": None}])
def test_a_manifest_of_other_values_is_refused(cache, changes):
    content = json.loads((cache / prebuilt.MANIFEST).read_text()) | changes
    (cache / prebuilt.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(prebuilt.ManifestError, match="cannot be read"):
        prebuilt.read(cache)


def test_a_link_in_the_cache_is_not_followed(cache, entry, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "folder"
    shutil.move(cache / entry.folder, outside)
    (cache / entry.folder).symlink_to(outside)
    assert prebuilt.relocate(cache, prebuilt.read(cache)) == {}
    assert problems(cache) == ["gated_residual sm_80 ROWS 2, 8 warps: a link in the place of its folder"]


@pytest.mark.parametrize("content", ["{", "[]", '{"child_paths": []}', '{"child_paths": {"a": 1}}'])
def test_a_broken_list_of_files_is_mended_like_a_moved_one(cache, entry, content):
    (group,) = (cache / entry.folder).glob("__grp__*")
    group.write_text(content)
    assert "it was moved" in problems(cache)[0]
    assert list(prebuilt.relocate(cache, prebuilt.read(cache))) == [group]


def test_a_target_of_another_version_is_named(cache, entry):
    manifest = dataclasses.replace(prebuilt.read(cache), backends={"sm_80": "0", "sm_777": "0"})
    found = prebuilt.problems(cache, manifest, VERSION)
    assert found[0].startswith("sm_80: built by another ptxas") and len(found) == 2
    assert found[1].startswith("sm_777: unknown to this version; it knows sm_80, sm_86")


def test_the_manifest_says_what_it_holds(cache):
    content = json.loads((cache / prebuilt.MANIFEST).read_text())
    assert content["versions"].keys() == {"torch", "triton", "cogvx_fast", "python"}
    assert content["entries"][0]["kernel"] == "gated_residual" and content["models"] == [{"heads": 2}]
