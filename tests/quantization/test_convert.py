"""What `cogvx-fast quantize` writes and does not: the same bytes each time, after kills too, and nothing private."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cogvx_fast import FastCogVideoXPipeline
from cogvx_fast.cli import app
from cogvx_fast.quantization import convert, manifest
from cogvx_fast.quantization.convert import quantize_checkpoint
from cogvx_fast.quantization.manifest import CheckpointError
from cogvx_fast.quantization.source import other_files
from tests import toy

ROOT = Path(__file__).parents[2]
SHARD = 2**15
# The command, which stands still at the write of that number when half of it is in the file.
STANDS_STILL = """
import sys, time
from pathlib import Path
from cogvx_fast import files
from cogvx_fast.cli import main
from cogvx_fast.quantization import convert

left, replace = int(sys.argv.pop()), files.os.replace

def standing_still(temporary, path):
    global left
    left -= 1
    if left == 0:
        print(path, flush=True)
        time.sleep(600)
    replace(temporary, path)

files.os.replace = standing_still
convert.quantize_checkpoint.__defaults__ = tuple(2**15 if x == convert.MAX_SHARD else x for x in
                                                 convert.quantize_checkpoint.__defaults__)
main()
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    toy.pipeline("5b").to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def source(made, tmp_path):
    return shutil.copytree(made, tmp_path / "source")


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "int8"
    quantize_checkpoint(made, out, "int8", max_shard=SHARD)
    return contents(out)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def quantize(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def test_the_same_order_makes_the_same_bytes(made, finished, tmp_path):
    for number in range(3):  # metadata in an order of chance would be the same now and then
        quantize_checkpoint(made, tmp_path / str(number), "int8", max_shard=SHARD)
        assert contents(tmp_path / str(number)) == finished


@pytest.mark.slow
@pytest.mark.parametrize(("write", "at"), [(1, convert.PROGRESS), (4, "quantized-00002.safetensors"), (-1, "")])
def test_a_killed_run_goes_on_and_leaves_nothing(made, finished, tmp_path, write, at):
    # Writes are the first list of what is finished, then each file and the list again, then the manifest.
    last = 2 * (len(finished) - 1) + 2
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", STANDS_STILL, "quantize", str(made), str(out), str(last if at == "" else write)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip().endswith(at or manifest.NAME)
        process.kill()
    assert [path for path in out.rglob("*.partial")], "something was half-written"
    quantize_checkpoint(made, out, "int8", max_shard=SHARD)
    assert contents(out) == finished


@pytest.mark.slow
def test_sigterm_leaves_no_half_file_and_says_how_to_go_on(made, finished, tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", STANDS_STILL, "quantize", str(made), str(out), "4"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in stderr
    assert "interrupted; files that were finished are kept; the same command goes on with the others" in stderr
    assert "video" not in stderr
    assert set(contents(out)) == {convert.PROGRESS, "transformer/quantized-00001.safetensors"}


def test_a_run_that_ended_after_its_last_file_is_finished(made, finished, tmp_path, monkeypatch):
    write = manifest.Manifest.write

    def end(self, folder):
        write(self, folder)
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(manifest.Manifest, "write", end)
        quantize_checkpoint(made, out, "int8", max_shard=SHARD)
    assert contents(out).keys() == {*finished, convert.PROGRESS}
    quantize_checkpoint(made, out, "int8", max_shard=SHARD)
    assert contents(out) == finished
    with pytest.raises(CheckpointError, match="holds a quantized checkpoint already"):
        quantize_checkpoint(made, out, "int8", max_shard=SHARD)


@pytest.mark.parametrize("broken", ["{", "[]", '{"order": [], "files": {}}', '{"order": {}, "files": []}', "\ud800"])
def test_a_broken_list_of_what_is_finished_is_one_line(made, tmp_path, broken):
    out = tmp_path / "out"
    out.mkdir()
    (out / convert.PROGRESS).write_bytes(broken.encode("utf-8", "surrogatepass"))
    result = quantize(made, out)
    assert result.exit_code == 2
    words = " ".join(result.stderr.split())
    assert f"error: OUT '{out}': {out / convert.PROGRESS} cannot be read: remove {out} or name another" in words
    assert list(out.iterdir()) == [out / convert.PROGRESS]


@pytest.mark.parametrize("place", ["vae/config.json", "scheduler/mine.json", "tokenizer", "README.md", "transformer"])
def test_links_out_of_the_model_are_refused(source, tmp_path, place):
    private = tmp_path / "private"
    path = source / place
    if path.is_dir():
        path.rename(private)
    else:
        private.write_bytes(path.read_bytes() if path.exists() else b"private")
        path.unlink(missing_ok=True)
    path.symlink_to(private)
    result = quantize(source, tmp_path / "out")
    words = " ".join(result.stderr.split())
    assert result.exit_code == 2 and f"leads out of {source}, to {private}" in words and place in words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["../private", ".", "..", "/private"])
def test_a_component_that_is_no_folder_of_the_model_is_refused(source, tmp_path, part):
    index = source / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {part: ["diffusers", "AutoencoderKLCogVideoX"]}))
    with pytest.raises(CheckpointError, match=r"model_index\.json has a component .*; must be the name of a folder"):
        quantize_checkpoint(source, tmp_path / "out", "int8")


def test_links_within_the_model_and_to_downloads_are_followed(source, finished, tmp_path):
    """The hub's cache: a folder of links to files that are named by their content."""
    blobs, snapshot = tmp_path / "models--owner--name" / "blobs", tmp_path / "models--owner--name" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        link.symlink_to(blobs / str(number))
    (snapshot / "scheduler" / "same.json").symlink_to("scheduler_config.json")
    quantize_checkpoint(snapshot, tmp_path / "out", "int8", max_shard=SHARD)
    written = contents(tmp_path / "out")
    assert written.pop("scheduler/same.json") == written["scheduler/scheduler_config.json"]
    assert written.keys() == finished.keys() and not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_data_of_the_components_is_copied_and_nothing_else(source, tmp_path):
    before = set(other_files(source))
    papers, code = ("LICENSE", "README.md"), ("README.py", "license.bin", "run.py", "vae/model.py", "vae/old.bin")
    for name in (*papers, *code, "notes.json", "vae/.hidden.json"):
        (source / name).write_text("x")
    (source / "assets").mkdir()
    (source / "assets" / "clip.json").write_text("x")
    assert set(other_files(source)) - before == set(papers)
    quantize_checkpoint(source, tmp_path / "out", "int8")
    FastCogVideoXPipeline.from_pretrained(tmp_path / "out")
    assert not [name for name in contents(tmp_path / "out") if name.endswith((".py", ".bin"))]


def test_weights_in_pickles_alone_are_refused(source, tmp_path):
    weights = next((source / "vae").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"vae: has weights in .*\.bin only; must be safetensors: .* any code"):
        quantize_checkpoint(source, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["source/out", "link/deep/out", "source"])
def test_out_within_the_model_is_refused(source, tmp_path, name):
    (tmp_path / "link").symlink_to(source)
    before = contents(source)
    result = quantize(source, tmp_path / name)
    assert result.exit_code == 2 and f"OUT '{tmp_path / name}': " in result.stderr
    assert "of which it would become a part" in " ".join(result.stderr.split())
    assert contents(source) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [("file", "is a file; name a folder"), ("file/out", "Not a directory"), ("x" * 300, "(File name too long)")],
)
def test_out_that_cannot_be_is_refused(made, tmp_path, name, message):
    (tmp_path / "file").write_text("mine")
    result = quantize(made, tmp_path / name)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize("broken", ["{", "[]"])
def test_broken_json_of_the_model_is_named(source, tmp_path, name, broken):
    (source / name).write_text(broken)
    result = quantize(source, tmp_path / "out")
    assert result.exit_code == 2 and f"its {name} cannot be read (" in " ".join(result.stderr.split())
