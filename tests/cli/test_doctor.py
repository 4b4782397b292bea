import importlib.util
import json
import os
import re
import sys
import tempfile

import av
import pytest
import torch
from cogvx_kernels._cpp import cache

import cogvx_fast
from cogvx_fast import machine
from cogvx_fast.cli import doctor
from tests.availability import set_missing


def test_json_says_what_is_installed(run):
    report = json.loads(run("doctor", "--json").stdout)
    assert report["versions"]["cogvx_fast"] == cogvx_fast.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["torch_threads"] == torch.get_num_threads()
    assert report["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert 2**28 < report["cpu"]["memory_available"] < report["cpu"]["memory"]
    assert len(report["cuda"]) == torch.cuda.device_count()
    assert report["backends"]["libx264"]["found"] is True


def test_missing_backends_say_what_they_give_and_how_to_get_them(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flash_attn" else find_spec(name))
    result = run("doctor")
    assert result.exit_code == 0
    line = next(line for line in result.stdout.splitlines() if "flash-attn" in line)
    assert " no " in line
    assert "exact attention kernels" in line
    assert 'pip install "cogvx_fast[flash]"' in line


def test_cpu_kernels_say_what_keeps_them(run, monkeypatch):
    set_missing(monkeypatch, {"cpu": "no C++ compiler found"})
    kernel = json.loads(run("doctor", "--json").stdout)["backends"]["C++ operations"]
    assert kernel["found"] is False and kernel["install"] == "install a C++ compiler: no C++ compiler found"
    set_missing(monkeypatch, {"cpu": "g++ did not finish in 120 s"})
    kernel = json.loads(run("doctor", "--json").stdout)["backends"]["C++ operations"]
    assert kernel["found"] is False and kernel["install"] == "g++ did not finish in 120 s"
    set_missing(monkeypatch, {"cpu": None})
    assert json.loads(run("doctor", "--json").stdout)["backends"]["C++ operations"]["found"] is True


def test_it_says_where_compiled_libraries_are_kept_if_not_at_home(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = json.loads(run("doctor", "--json").stdout)["compiled"]
    assert compiled == {"folder": str(tmp_path / "cogvx_kernels"), "problem": None}
    assert "Compiled C++" not in run("doctor").stdout
    (tmp_path / "cogvx_kernels").chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache._temporary.cache_clear()
    temporary = tmp_path / f"cogvx_kernels-{os.geteuid()}"
    compiled = json.loads(run("doctor", "--json").stdout)["compiled"]
    assert compiled["folder"] == str(temporary)
    assert f"Compiled C++ is kept in {temporary}: {compiled['problem']}." in run("doctor").stdout
    assert "can be written by other users (mode 777)" in compiled["problem"]
    cache._temporary.cache_clear()


def test_without_pyav_it_says_what_is_missing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # as it is where nothing can be imported
    monkeypatch.setattr(machine, "installed_version", lambda package: None if package == "av" else "1.2.3")
    report = json.loads(run("doctor", "--json").stdout)["backends"]["libx264"]
    assert report["found"] is False and report["version"] is None
    assert report["install"].startswith("pip install av: PyAV cannot be imported (")
    monkeypatch.setenv("COLUMNS", "250")
    line = next(line for line in run("doctor").stdout.splitlines() if "libx264" in line)
    assert " no " in line and "MP4 output (H.264)" in line and "PyAV cannot be imported" in line


def test_a_pyav_without_h264_is_told_from_none(run, monkeypatch):
    def without(name, mode):
        raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr(av.codec, "Codec", without)
    report = json.loads(run("doctor", "--json").stdout)["backends"]["libx264"]
    assert report["found"] is False and report["version"] == f"PyAV {av.__version__}"
    assert report["install"] == "pip install --force-reinstall av: this build of PyAV has no libx264"


def test_backends_are_found_without_being_imported(run, tmp_path, monkeypatch):
    (tmp_path / "xformers.py").write_text("raise RuntimeError('imported')")
    metadata = tmp_path / "xformers-9.8.7.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 9.8.7\n")
    monkeypatch.syspath_prepend(tmp_path)
    report = json.loads(run("doctor", "--json").stdout)
    assert report["backends"]["xformers"]["found"] is True
    assert report["backends"]["xformers"]["version"] == "9.8.7"


def test_a_missing_package_is_said_to_be_missing(run, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert "not installed" in run("doctor").stdout


def test_cuda_devices_show_their_capability(run, monkeypatch):
    properties = type(
        "Properties",
        (),
        {"name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 80 * 2**30},
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setenv("COLUMNS", "200")
    line = next(line for line in run("doctor").stdout.splitlines() if "cuda:0" in line)
    for expected in ("NVIDIA H100", "capability 9.0", "fp16, int8, bf16, fp8", "80.0 GiB, 132 SMs"):
        assert expected in line


def test_the_memory_of_a_size_is_planned(run):
    order = ("doctor", "--height", 480, "--width", 720, "--frames", 49, "--dtype", "bfloat16", "--device", "cpu")
    memory = json.loads(run(*order, "--json", "--vae-memory", "4GiB").stdout)["memory"]
    assert (memory["height"], memory["width"], memory["num_frames"]) == (480, 720, 49)
    assert all(3 * 2**30 < plan["peak"] <= 4 * 2**30 for plan in memory["plans"].values())
    plans = json.loads(run(*order, "--json").stdout)["memory"]["plans"]
    assert 4 * 2**30 < plans["decode, streamed"]["peak"] < plans["decode"]["peak"]
    shown = run(*order)
    assert "49 frames of 720x480, bfloat16, cpu" in " ".join(shown.stdout.split())
    assert not shown.stderr


def test_the_memory_of_a_checkpoint_is_planned(run, checkpoint):
    memory = json.loads(run("doctor", "--json", "--model", checkpoint).stdout)["memory"]
    assert memory["height"] == memory["width"] == 32 and memory["num_frames"] == 9
    assert 0 < memory["plans"]["decode"]["peak"] < 2**24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--vae-memory", "1MiB"), r"--vae-memory '1MiB': a budget of 1.00 MiB is too small .* smallest possible is"),
        (("--vae-memory", "much"), "--vae-memory 'much': .*such as '4GiB'"),
        (("--height", "50"), "--height 50: must be a multiple of 16; nearest: 48 or 64"),
        (("--frames", "50"), r"--frames 50: must be 8N\+1"),
        (("--model", "nothing/at/all"), "--model 'nothing/at/all'"),
    ],
)
def test_what_cannot_be_planned_is_refused(run, options, message):
    result = run("doctor", *options)
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split()))
