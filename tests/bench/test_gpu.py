"""Clocks, power and temperature during a measurement, from an nvidia-smi that a test makes up."""

import os
import stat
import sys
import time

import pytest
import torch

from cogvx_fast.bench import gpu, runner
from cogvx_fast.bench.comparison import Comparison
from cogvx_fast.bench.contenders import CONTENDERS
from cogvx_fast.bench.series import Plan, gpu_in_words

from .conftest import row

# Answers as the real one does: one line for a question, line after line with -lms, an error for what it does not know.
FAKE = """#!{python}
import datetime, os, sys, time

asked = dict(part.split("=", 1) for part in sys.argv[1:] if "=" in part)
fields = asked["--query-gpu"].split(",")
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + chr(10))
if {unknown!r} in fields:
    print(f'Field "{unknown}" is not a valid field to query.')
    sys.exit(2)
samples = {samples!r}
values = {{"driver_version": "570.1", "power.limit": "700.00", "clocks.max.sm": "1980"}}
number = 0
while True:
    sm, memory, power, heat, reasons = samples[min(number, len(samples) - 1)]
    values |= {{"timestamp": datetime.datetime.now().strftime("%Y/%m/%d %H:%M:%S.%f")[:-3]}}
    values |= {{"clocks.sm": sm, "clocks.mem": memory, "power.draw": power, "temperature.gpu": heat}}
    values |= {{"clocks_event_reasons.active": reasons, "clocks_throttle_reasons.active": reasons}}
    print(", ".join(values[field] for field in fields), flush=True)
    if "-lms" not in sys.argv:
        break
    number += 1
    time.sleep(0.02)
"""
STEADY = ("1980", "2619", "650.10", "55", "0x0000000000000000")
IDLE = ("1970", "2619", "120.00", "40", "0x0000000000000001")
LIMITED = ("1600", "2619", "700.00", "71", "0x0000000000000004")
HOT = ("1950", "2619", "690.00", "90", "0x0000000000000060")


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi into PATH that gives these samples; returns the file of what it was asked."""

    def put(*samples, unknown=""):
        log, script = tmp_path / "asked", tmp_path / "nvidia-smi"
        script.write_text(FAKE.format(python=sys.executable, log=str(log), samples=list(samples), unknown=unknown))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return log

    return put


def measured(count=6, name="GPU-abc"):
    """A watch over one call that lasts until so many samples have come."""
    with gpu.sampled(name) as watch, watch.span("ours"):
        deadline = time.monotonic() + 30
        while len(watch.samples) < count and time.monotonic() < deadline:
            time.sleep(0.01)
    return watch


def test_quantities_are_summed_up_by_minimum_median_and_maximum(smi):
    asked = smi(STEADY, IDLE, STEADY)
    state = measured().state("ours")
    assert state["sm_clock_mhz"] == {"min": 1970, "median": 1980, "max": 1980}
    assert state["power_watts"] == {"min": 120, "median": 650.1, "max": 650.1}
    assert state["memory_clock_mhz"]["max"] == 2619 and state["temperature_celsius"]["min"] == 40
    assert state["samples"] >= 2 and state["during"] == "the timed calls of this contender"
    assert (state["held_back_by"], state["warning"]) == ([], "")  # idle is no fault
    assert all(line.endswith("-i GPU-abc") or "-i GPU-abc -lms 100" in line for line in asked.read_text().splitlines())


def test_a_clock_that_falls_and_what_held_it_back_are_a_warning(smi):
    smi(STEADY, STEADY, LIMITED, HOT)
    state = measured().state("ours")
    reasons = ["the power limit", "its temperature, by the driver", "its temperature, by the hardware"]
    assert state["held_back_by"] == reasons
    assert state["warning"] == (
        f"the multiprocessors' clock fell to 1600 of 1980 MHz; clocks were held back by {', '.join(reasons)}"
    )
    warned = row(gpu_state=state)
    assert Comparison.line(warned).endswith(f"WARNING: {state['warning']}")
    assert f"sm clock 1600 to 1980 MHz, median {state['sm_clock_mhz']['median']:g}" in gpu_in_words(state)
    assert type(warned).from_json(warned.to_json()) == warned


def test_the_power_limit_alone_is_no_warning(smi):
    """It is what sets the clocks of most GPUs at full load."""
    limited = (*STEADY[:-1], LIMITED[-1])
    smi(limited)
    state = measured().state("ours")
    assert state["held_back_by"] == ["the power limit"] and state["warning"] == ""


def test_a_driver_of_before_the_reasons_were_renamed(smi):
    smi(LIMITED, unknown="clocks_event_reasons.active")
    assert measured().state("ours")["held_back_by"] == ["the power limit"]


def test_a_gpu_that_does_not_have_a_quantity(smi):
    smi(("1980", "[N/A]", "[N/A]", "55", "[N/A]"))
    state = measured().state("ours")
    assert "power_watts" not in state and state["sm_clock_mhz"]["max"] == 1980 and state["warning"] == ""


def test_the_process_is_gone_afterwards_also_when_a_call_fails(smi):
    asked = smi(STEADY)
    with pytest.raises(RuntimeError), gpu.sampled("GPU-abc"):
        raise RuntimeError
    before = asked.read_text()
    watch = measured()
    count = len(watch.samples)
    time.sleep(0.1)
    assert len(watch.samples) == count and before


def test_calls_that_are_too_short_get_the_samples_of_all():
    quantities = {"sm_clock_mhz": 1000.0}
    watch = gpu.Watch(samples=[gpu.Sample(at, quantities, 0) for at in (1.0, 2.0, 3.0, 9.0)])
    watch._spans = {"short": [(0.9, 1.1)], "long": [(1.5, 4.0)]}
    assert (watch.state("long")["samples"], watch.state("long")["during"]) == (2, "the timed calls of this contender")
    assert (watch.state("short")["samples"], watch.state("short")["during"]) == (3, "the timed calls of all contenders")
    watch._spans = {"short": [(5.0, 5.1)]}
    assert watch.state("short") == {"samples": 0, "why_none": "the calls were over before nvidia-smi gave a sample"}


def test_without_nvidia_smi_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.ask("GPU-abc", ["driver_version"]) is None
    with gpu.sampled("GPU-abc") as watch, watch.span("ours"):
        pass
    state = watch.state("ours")
    assert state == {"samples": 0, "why_none": "nvidia-smi is not there, or does not know GPU-abc"}
    assert gpu_in_words(state) == f"clocks not known: {state['why_none']}"


def test_a_gpu_is_named_by_what_cuda_visible_devices_does_not_change(monkeypatch):
    by_uuid, by_place = {"uuid": "11-22"}, {"uuid": "", "pci_domain_id": 0, "pci_bus_id": 0xA1, "pci_device_id": 0}
    for fields, expected in ((by_uuid, "GPU-11-22"), (by_place, "00000000:a1:00.0"), ({"uuid": "MIG-1"}, "MIG-1")):
        properties = type("Properties", (), fields)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, properties=properties: properties)
        assert gpu.identifier(1) == expected


def test_the_gpu_that_is_measured_is_the_one_that_is_watched(smi, monkeypatch):
    asked = smi(STEADY)
    monkeypatch.setattr(gpu, "identifier", lambda index: f"GPU-of-{index}")
    with gpu.watched(torch.device("cuda", 3)) as watch:
        assert watch is not None
    assert "-i GPU-of-3" in asked.read_text()
    with gpu.watched(torch.device("cpu")) as watch:
        assert watch is None


def test_a_row_states_what_the_gpu_was_at(toy_step, smi, monkeypatch):
    smi(STEADY, STEADY, LIMITED)
    monkeypatch.setattr(runner.gpu, "watched", lambda device: gpu.sampled("GPU-abc"))
    made = CONTENDERS["diffusers"]
    (one,) = runner.run(Plan(toy_step, "float32", "cpu", "x", warmup=0, runs=20), {"diffusers": made})
    assert one.gpu_state["samples"] >= 1 and one.gpu_state["memory_clock_mhz"]["max"] == 2619
