"""The comparison as a whole: what is measured and kept, resuming, rows and their picture, and what is refused."""

import dataclasses
import json

import pytest
import torch

from benchmarks.quality import metrics, prompts
from benchmarks.quality.command import main, setting_of
from benchmarks.quality.methods import METHODS, REFERENCES
from benchmarks.quality.runs import Runs
from benchmarks.quality.setting import Setting
from cogvx_fast import demo_checkpoint
from cogvx_fast.bench import results
from cogvx_fast.bench.rows import RowError
from cogvx_fast.bench.skipping import Skipping
from tests.bench.conftest import row

STEPS = 6
WANTED = [(REFERENCES["fast"], STEPS), (METHODS["fewer steps"], 4)]


def setting(clips=2, **changes):
    # Not in bf16, which CPUs without units for it take minutes for.
    values = {"prompts": prompts.chosen(None, True).first(clips), "steps": STEPS, "dtype": "float32", **changes}
    return Setting(demo_checkpoint(), "demo", **values)


def made(runs, monkeypatch):
    """The batches that `runs` generates when it makes what is missing."""
    batches, generate = [], Runs._generate

    def watch(self, pipe, batch, arguments):
        batches.append((arguments["num_inference_steps"], batch))
        return generate(self, pipe, batch, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Runs, "_generate", watch)
        runs.make(WANTED, progress=False)
    return batches


@pytest.mark.slow
def test_what_is_there_is_not_made_again(tmp_path, monkeypatch):
    assert made(Runs(setting(), tmp_path), monkeypatch) == [
        (6, range(0, 1)),
        (6, range(1, 2)),
        (4, range(0, 1)),
        (4, range(1, 2)),
    ]
    clips = Runs(setting(), tmp_path).clips(WANTED[1])
    assert made(Runs(setting(), tmp_path), monkeypatch) == []
    next(tmp_path.glob("fewer-steps-4-clips-0001-*.json")).unlink()
    assert made(Runs(setting(), tmp_path), monkeypatch) == [(4, range(1, 2))]
    assert Runs(setting(), tmp_path).clips(WANTED[1]) == clips
    assert made(Runs(setting(3), tmp_path), monkeypatch) == [(6, range(2, 3)), (4, range(2, 3))]


def test_the_reference_is_at_no_distance_from_itself(tmp_path):
    runs = Runs(setting(1), tmp_path)
    runs.make(WANTED, progress=False)
    (itself,), (fewer,) = map(runs.clips, WANTED)
    assert itself["psnr_db"] == itself["temporal_psnr_db"] == metrics.CEILING_DB
    assert itself["ssim"] == pytest.approx(1) and itself["motion"] == 1 and itself["evaluations"] == STEPS
    assert 10 < fewer["psnr_db"] < 60 and fewer["ssim"] < 1 and fewer["evaluations"] == 4
    assert set(fewer["shows"]) == {"background", "color", "shape", "motion"}


def test_a_method_that_does_not_fit_is_left_out_and_the_others_go_on(tmp_path):
    def apply(pipe, job, parameters):
        raise torch.OutOfMemoryError

    greedy = dataclasses.replace(METHODS["periodic reuse"], apply=apply)
    runs = Runs(setting(1), tmp_path)
    runs.make([WANTED[0], (greedy, 4), WANTED[1]], progress=False)
    assert runs.clips((greedy, 4)) is None and len(runs.clips(WANTED[1])) == 1
    assert "periodic reuse does not fit" in runs.parameters((greedy, 4))["unreachable"]
    assert Runs(setting(1), tmp_path).missing([(greedy, 4)]) == []


def test_a_folder_is_of_one_setting(tmp_path):
    first = setting().claim(tmp_path)
    assert setting().claim(tmp_path) == first
    assert setting(3).claim(tmp_path) != first  # more clips of the same list are another run, and allowed
    with pytest.raises(ValueError, match=r"of another comparison \(steps: 6 there, 7 here\): name another folder"):
        setting(steps=7).claim(tmp_path)
    with pytest.raises(ValueError, match="prompts: "):
        setting(prompts=prompts.chosen("shipped", True)).claim(tmp_path)


def test_distances_of_known_changes():
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(5, 3, 24, 24, generator=generator)
    darker = metrics.distance(clip - 0.1, clip)
    assert darker["psnr_db"] == pytest.approx(20, abs=1e-3) and darker["motion"] == pytest.approx(1, abs=1e-4)
    assert darker["temporal_psnr_db"] == metrics.CEILING_DB  # another tint, the same motion
    slower = metrics.distance(clip / 2, clip)
    assert slower["motion"] == pytest.approx(0.5) and slower["temporal_psnr_db"] < 20


def test_flip_sees_a_difference():
    pytest.importorskip("flip_evaluator")
    clip = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert metrics.distance(clip, clip)["flip"] == pytest.approx(0, abs=1e-4)
    assert metrics.distance(1 - clip, clip)["flip"] > 0.1


def test_prompts(tmp_path):
    demo, shipped = prompts.chosen(None, True), prompts.chosen("shipped", True)
    assert len(demo.texts) == len(demo.scenes) == 60 and len(set(shipped.texts)) == 32
    assert shipped.scenes is None and all(len(text.split()) >= 20 for text in shipped.texts)
    few = demo.first(7)
    assert few.texts == demo.texts[:7] and few.digest == demo.digest != shipped.digest
    own = tmp_path / "own.txt"
    own.write_text("one\n\n two \n")
    assert prompts.chosen(str(own), False).texts == ("one", "two")
    own.write_text("\n")
    with pytest.raises(ValueError, match="no prompt in it"):
        prompts.chosen(str(own), False)


def test_vbenchs_list_where_it_is_installed(tmp_path, monkeypatch):
    package = tmp_path / "vbench"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    listed = [{"prompt_en": f"prompt {i}", "dimension": ["color"]} for i in range(5)]
    (package / "VBench_full_info.json").write_text(json.dumps(listed))
    monkeypatch.syspath_prepend(tmp_path)
    found = prompts.chosen(None, False)
    assert found.name == "VBench" and sorted(found.texts) == [f"prompt {i}" for i in range(5)]
    assert prompts.chosen(None, True).scenes is not None


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_bad_input_is_named_before_any_work(tmp_path, capsys):
    work = ("--work", tmp_path / "work")
    assert "swiftly unknown; allowed: turbo, fewer steps, periodic reuse" in refused(
        capsys, "demo", *work, "--methods", "swiftly"
    )
    assert "--evaluations 51 must be 4 to 50" in refused(capsys, "demo", *work, "--evaluations", "51,20")
    assert "--evaluations 3 must be 4 to 50" in refused(capsys, "demo", *work, "--evaluations", "3")
    assert "'a' must be whole numbers" in refused(capsys, "demo", *work, "--evaluations", "a")
    assert "--clips 61 must be 1 to 60" in refused(capsys, "demo", *work, "--clips", "61")
    assert "--batch 0 must be at least 1" in refused(capsys, "demo", *work, "--batch", "0")
    assert "must be demo, vbench, shipped or a file" in refused(capsys, "demo", *work, "--prompts", tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused(capsys, empty, *work)
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_rows_and_their_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows, asked = tmp_path / "rows.jsonl", ("--clips", "1", "--steps", "12", "--dtype", "float32", "--methods")
    command = ["demo", "--work", str(tmp_path / "work"), "--rows", str(rows), "--evaluations", "4", *asked]
    main([*command, "fewer steps,Pyramid Attention Broadcast (diffusers)"])
    table = capsys.readouterr().out
    found = results.read(rows)
    assert [(r.contender, r.gate) for r in found] == [
        ("all", "lossy"),
        ("all (diffusers)", "lossy"),
        ("fewer steps", "lossy"),
        ("Pyramid Attention Broadcast (diffusers)", "red"),
    ]
    fewer, pyramid = found[2:]
    assert fewer.extras["evaluations"] == fewer.extras["evaluations_asked"] == 4 and fewer.n == 1
    assert f"| fewer steps |  | {fewer.extras['psnr_db']:.1f} (" in table and "cannot be brought to 4" in table
    assert pyramid.n == 0 and "cannot be brought to 4" in pyramid.gate_detail
    main([*command, "fewer steps,periodic reuse"])  # adds what is new
    assert [r.contender for r in results.read(rows)[4:]] == ["periodic reuse"]
    picture = tmp_path / "plot.png"
    main(["plot", str(rows), "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "other.jsonl"
    other.write_text("")
    assert "no row of series turbo-quality" in refused(capsys, "plot", other, "--out", picture)


def test_rows_state_their_distance_and_no_times():
    timeless = dict.fromkeys(("p20_seconds", "p50_seconds", "p80_seconds", "first_call_seconds", "peak_memory_bytes"))
    stated = {"evaluations_asked": 17, "evaluations": 17.0, "psnr_db": 40.0, "psnr_lowest_db": 38.0, "ssim": 0.9}
    good = {"series": "turbo-quality", "gate": "lossy", "peak_memory_kind": "", **timeless}
    Skipping.check(row("periodic reuse", extras=stated, **good))
    with pytest.raises(RowError, match="ssim is missing"):
        Skipping.check(row("periodic reuse", extras={k: v for k, v in stated.items() if k != "ssim"}, **good))
    with pytest.raises(RowError, match="states no times"):
        Skipping.check(row("periodic reuse", extras=stated, **{**good, "peak_memory_bytes": 1}))


def test_the_demo_is_known_by_its_folder(tmp_path):
    def of(model):
        values = {"model": model, "evaluations": [5], "steps": 6, "batch": None, "prompts": None, "clips": None}
        values |= {"dtype": "float32", "device": "cpu", "guidance": 6.0, "schedule": None}
        return setting_of(type("Asked", (), values))

    assert of("demo") == of(demo_checkpoint()) and of("demo").batch == 10
    other = of(str(tmp_path))
    assert other.batch == 1 and other.workload == tmp_path.name and other.prompts.name == "the 32 shipped prompts"
