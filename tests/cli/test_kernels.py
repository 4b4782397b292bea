import json
import shutil
from pathlib import Path

import pytest
from cogvx_kernels._triton import why_unavailable

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)

from cogvx_kernels._triton.tuned import TunedKernel
from cogvx_kernels.aot import farm, models, prebuilt
from cogvx_kernels.inspect import machine_code, report

pytestmark = pytest.mark.slow

ONE = ("--kernel", "gated_residual", "--first", "--jobs", 1)  # a kernel that compiles in a second


def test_inspect_prints_tables(run):
    result = run("kernels", "inspect", "--arch", "sm_80,gfx942", *ONE)
    assert result.exit_code == 0, result.stderr
    assert "Resources of gated_residual" in result.stdout and "Inner loops of gated_residual" in result.stdout
    assert "5 load 128, 2 store 128" in result.stdout and "6.00 B, 1.00 x" in result.stdout
    assert "A transformer block launches 8 kernels (9 at most): addmm, qk_norm_rope, attention, " in result.stdout
    assert "In 8 bits throughout it launches 9: scaled_linear, qk_norm_rope_int8, int8_attention, " in result.stdout
    assert "gfx942: the pipes of AMD's multiprocessors are not modelled: resources only" in result.stdout
    assert not result.files


def test_inspect_json_of_a_loop_that_is_known(run):
    """Attention on sm_80: 64 keys and 128 queries a trip are 4 x 128 products of 16 x 8 x 16."""
    result = run("kernels", "inspect", "--arch", "sm_80", "--kernel", "attention", "--first", "--json", "--jobs", 1)
    assert result.exit_code == 0, result.stderr
    (one,) = json.loads(result.stdout)
    (loop,) = one["loops"]
    assert one["configuration"] == "BLOCK_M 128, BLOCK_N 64, 4 warps, 3 stages" and one["dtype"] == "float16"
    assert loop["cost"]["macs"] == 2 * 128 * 64 * 64 == 4 * 128 * 16 * 8 * 16
    assert loop["cost"]["cycles"]["tensor"] == 1024
    # Exponentials: one for each of 64 x 128 scores and four lanes of each row's correction, 16 a clock.
    assert loop["cost"]["cycles"]["special"] == (64 * 128 + 128 * 4) / 16
    assert loop["cost"]["unknown"] == {} and one["tensor_ceiling"] == 1 and one["meets_goal"] is True
    assert one["resources"]["registers"] <= 255 and one["resources"]["spills"] == 0


def test_inspect_a_page_its_check_and_a_plot(run, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "here" / "page.md"
    page.write_text(f"# Kernels\n{report.BEGIN} none -->\n{report.END}\nrest\n")
    assert "page.md is out of date" in run("kernels", "inspect", "--arch", "sm_80", *ONE, "--check", page).stderr
    result = run("kernels", "inspect", "--arch", "sm_80", *ONE, "--write", page, "--plot", "p.png")
    assert result.exit_code == 0, result.stderr
    text = page.read_text()
    assert text.startswith("# Kernels\n") and text.endswith(f"{report.END}\nrest\n")
    assert "| gated_residual | sm_80 | float16 | ROWS 2, 8 warps | 36 | 0 | 0.0 | 6: registers |" in text
    assert "\n\nA transformer block launches 8 kernels" in text
    assert (tmp_path / "here" / "p.png").read_bytes().startswith(b"\x89PNG")
    assert run("kernels", "inspect", "--arch", "sm_80", *ONE, "--check", page).exit_code == 0
    assert run("kernels", "inspect", "--arch", "sm_86", *ONE, "--check", page).exit_code == 1


def test_the_page_is_up_to_date(run):
    """Compiles nothing: the stamp is of the kernels' sources, their configurations and what reads their code."""
    result = run("kernels", "inspect", "--check", Path(__file__).parents[2] / "docs" / "kernel-tables.md")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_75"], "--arch 'sm_75': is unknown; allowed: sm_80, sm_86"),
        (["--kernel", "softmax"], "--kernel 'softmax': is not launched by this model; allowed: layer_norm_modulate"),
        (["--dim", 100], "--dim 100: must be a multiple of 64"),
        (["--dim", 64, "--checkpoint", "x"], "--dim 64: cannot be combined with --checkpoint"),
        (["--checkpoint", "nowhere"], "--checkpoint 'nowhere': no such folder"),
        (["--plot", "p.svg"], "--plot 'p.svg': must end in .png"),
        (["--plot", "p.png", "--arch", "gfx942"], "--plot 'p.png': has nothing to show for gfx942"),
        (["--write", "none.md"], "--write 'none.md': No such file"),
        (["--plot", "/proc/p.png"], "--plot '/proc/p.png': cannot be written: "),
        (["--jobs", 0], "--jobs 0: must be at least 1"),
    ],
)
def test_inspect_refuses_before_any_work(run, monkeypatch, arguments, message):
    monkeypatch.setattr(farm, "run", lambda *_: pytest.fail("something was compiled"))
    result = run("kernels", "inspect", *arguments)
    assert result.exit_code == 2 and message in result.stderr and not result.files


def test_tools_that_are_not_there_are_named(run, monkeypatch, tmp_path):
    monkeypatch.setattr(machine_code, "_TOOLS", tmp_path)
    result = run("kernels", "inspect", "--arch", "sm_80", *ONE)
    assert result.exit_code == 1
    assert "machine code cannot be read here: cuobjdump and nvdisasm of the triton wheel are not in" in result.stderr


def test_a_kernel_that_does_not_compile_is_named(run, monkeypatch):
    def fails(launch, target, config):
        raise RuntimeError("ptxas said no")

    monkeypatch.setattr(farm, "compile_for", fails)
    result = run("kernels", "inspect", "--arch", "sm_80", *ONE)
    assert result.exit_code == 1
    assert "does not compile: gated_residual for sm_80, ROWS 2, 8 warps: ptxas said no" in result.stderr


@pytest.fixture
def few(monkeypatch, tmp_path):
    """A model of one small kernel, and triton's cache where the tests may write."""
    launches = models.Model.launches.fget
    monkeypatch.setattr(models.Model, "launches", property(lambda self: [launches(self)[1]]))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    forget()
    yield
    forget()


def forget():
    """What this process compiled, which lies in another cache."""
    farm._launches.cache_clear()
    for kernel in TunedKernel.all():
        kernel.fn.device_caches.clear()


def test_build_and_check(run, few, configuration, tmp_path, monkeypatch):
    model = configuration(num_attention_heads=2, sample_frames=9)
    arguments = ("kernels", "build", "--checkpoint", model, "--out", "cache", "--jobs", 1)
    result = run(*arguments, "--arch", "sm_80", "--height", 64, "--width", 96)
    assert result.exit_code == 0, result.stderr
    assert "3 configurations for sm_80 are in cache" in result.stdout
    cache = tmp_path / "here" / "cache"
    manifest = prebuilt.read(cache)
    (described,) = manifest.models
    assert described == {
        "heads": 2,
        "head_dim": 64,
        "dtype": "float16",
        "rotary": False,
        "tokens": 3 * (64 // 16) * (96 // 16),
        "text_length": 226,
        "batch": 2,
        "vae": {"channels": [128, 256, 256, 512], "latent_channels": 16, "groups": 32, "time_doublings": 2},
    }
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")}
    assert len(before) == 3
    assert run(*arguments, "--arch", "sm_80,sm_90").exit_code == 0
    after = {path: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")}
    assert len(after) == 6 and before.items() <= after.items()  # nothing was compiled twice
    result = run("kernels", "check", "--out", "cache")
    assert result.exit_code == 0 and "cache is whole: 6 configurations for sm_80, sm_90" in result.stdout

    shutil.move(cache, cache.with_name("moved"))
    result = run("kernels", "check", "--out", "moved", "--json")
    assert result.exit_code == 1 and len(json.loads(result.stdout)["problems"]) == 6
    assert "moved: 6 problems; Triton would compile again" in result.stderr
    assert run("kernels", "check", "--out", "moved", "--relocate").exit_code == 0

    with monkeypatch.context() as patched:
        broken = OSError(5, "Input/output error", "x.cubin")
        patched.setattr(prebuilt, "_sha256", lambda path: (_ for _ in ()).throw(broken))
        result = run("kernels", "check", "--out", "moved")
    assert result.exit_code == 1 and "error: x.cubin cannot be read: Input/output error" in result.stderr

    manifest = cache.with_name("moved") / prebuilt.MANIFEST
    manifest.write_text(manifest.read_text().replace('"folder": "', '"folder": "../outside/'))
    (tmp_path / "here" / "outside").mkdir()
    result = run("kernels", "check", "--out", "moved", "--relocate")
    assert result.exit_code == 1 and "must be the name of a folder or file in the cache" in result.stderr
    assert not list((tmp_path / "here" / "outside").iterdir())


def test_build_takes_the_checkpoints_own_autoencoder(run, configuration, monkeypatch):
    built = []
    monkeypatch.setattr(farm, "jobs", lambda model, targets: built.append(model) or [])
    own = {"block_out_channels": [8, 16, 24], "norm_num_groups": 4, "temporal_compression_ratio": 2}
    model = configuration(num_attention_heads=2, vae=own)
    assert run("kernels", "build", "--checkpoint", model, "--arch", "sm_80", "--out", "cache").exit_code == 0
    assert [model.vae for model in built] == [models.Autoencoder((8, 16, 24), 16, 4, 1)]
    result = run("kernels", "build", "--checkpoint", configuration(vae={"norm_num_groups": 5}), "--arch", "sm_80")
    assert result.exit_code == 2 and "its vae has 5 groups, which do not divide (128, 256, 256, 512)" in result.stderr


def test_check_and_build_errors(run, few, configuration, monkeypatch):
    assert "cogvx-fast-kernels.json is not there" in run("kernels", "check", "--out", "nowhere").stderr
    result = run("kernels", "build", "--arch", "sm_80", "--checkpoint", configuration(attention_head_dim=48))
    assert result.exit_code == 2 and "has heads of 48; the kernels take powers of two" in result.stderr
    result = run("kernels", "build", "--arch", "sm_80", "--checkpoint", configuration(), "--frames", 10)
    assert result.exit_code == 2 and "--frames 10: must be 8N+1" in result.stderr
    result = run("kernels", "build", "--arch", "sm_80", "--out", "/proc/cache")
    assert result.exit_code == 2 and "--out '/proc/cache': cannot be made" in result.stderr
    monkeypatch.setattr(farm, "run", lambda *_: pytest.fail("something was compiled"))
    result = run("kernels", "build", "--arch", "sm_80", "--out", "/proc/self")
    assert result.exit_code == 2 and "cogvx-fast-kernels.json': cannot be written: " in result.stderr
