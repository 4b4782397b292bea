"""diffusers' own tests of this family, once with its classes and once with ours in their place.

    python -m tools.run_diffusers_tests FOLDER [-k EXPRESSION] [--keep FOLDER] [--pipelines-only]

FOLDER is a checkout of diffusers, or holds its `tests`; nothing of it is here, and none of its files is changed. Each
test module is imported as it is; then the names of diffusers' classes in it, and in the classes it defines, are bound
to ours, which go by diffusers' names meanwhile: some of the tests look a class up in diffusers by its name, or compare
names. Printed is how many tests pass, fail and are skipped either way, and each test that ends differently; the exit
status is 1 if one passes with diffusers' classes and not with ours. Needed beside our own: pytest, peft, parameterized.

Without a network the tiny T5 that these tests name is made here, with random weights: tests of numbers that were
written down with the real one fail with either class, and so are no difference.

What does not apply, and why:

- Tests marked slow or nightly, of big accelerators, of single files and of the Hub's staging endpoint: they are skipped
  or fail with either class.
- `test_inference` of three pipelines compares with numbers of the real tiny T5: with one made here it fails with either
  class, as does `test_vae_tiling` of the Fun pipeline, whose tolerance is narrow for other embeddings.
- Tests that compare times or peak memory on a CUDA device are skipped without one.
"""

from __future__ import annotations

import argparse
import string
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILES = (
    "pipelines/cogvideo/test_cogvideox.py",
    "pipelines/cogvideo/test_cogvideox_image2video.py",
    "pipelines/cogvideo/test_cogvideox_video2video.py",
    "pipelines/cogvideo/test_cogvideox_fun_control.py",
    "models/transformers/test_models_transformer_cogvideox.py",
    "models/autoencoders/test_models_autoencoder_kl_cogvideox.py",
    "models/autoencoders/test_models_autoencoder_cogvideox.py",  # its name before
    "lora/test_lora_layers_cogvideox.py",
)
TINY_T5 = "tiny-random-t5"
ROOT = Path(__file__).parents[1]


def our_classes(pipelines_only: bool) -> dict[type, type]:
    """diffusers' classes, and what takes the place of each; models are made fast by a pipeline in any case."""
    import diffusers

    import cogvx_fast
    from cogvx_fast.transformer import FastCogVideoXTransformer3DModel
    from cogvx_fast.vae import FastAutoencoderKLCogVideoX

    pipelines = {
        getattr(diffusers, f"CogVideoX{name}Pipeline"): getattr(cogvx_fast, f"FastCogVideoX{name}Pipeline")
        for name in ("", "ImageToVideo", "VideoToVideo", "FunControl")
    }
    if pipelines_only:
        return pipelines
    models = {
        diffusers.CogVideoXTransformer3DModel: FastCogVideoXTransformer3DModel,
        diffusers.AutoencoderKLCogVideoX: FastAutoencoderKLCogVideoX,
    }
    return pipelines | models


def bind(namespace: Any, classes: dict[type, type]) -> None:
    """Wherever `namespace` names one of `classes` itself, it names what takes its place from now on."""
    for name, value in list(vars(namespace).items()):
        if isinstance(value, type) and value in classes:
            setattr(namespace, name, classes[value])


def bind_module(module: ModuleType, classes: dict[type, type]) -> None:
    """`bind` of a test module and of the classes that were defined in it."""
    bind(module, classes)
    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__ == module.__name__:
            bind(value, classes)


def make_tiny_t5() -> None:
    """transformers' loaders give a T5 of the tests' size for the name that they ask for, and load all else."""
    import torch
    import transformers

    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters += [(letter, -4.0) for letter in string.ascii_letters + string.digits + ".,!?'-"]
    config = transformers.T5Config(
        vocab_size=len(letters) + 16, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, use_cache=False
    )

    def model() -> transformers.T5EncoderModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return transformers.T5EncoderModel(config).eval()

    def tokenizer() -> transformers.T5Tokenizer:
        return transformers.T5Tokenizer(vocab=letters, extra_ids=0, model_max_length=512)

    made = {
        transformers.AutoTokenizer: tokenizer,
        transformers.T5Tokenizer: tokenizer,
        transformers.AutoConfig: lambda: config,
        transformers.T5EncoderModel: model,
    }
    for cls, make in made.items():
        cls.from_pretrained = _or_made(cls.from_pretrained, make)


def _or_made(load: Any, make: Any) -> Any:
    def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
        return make() if str(name).endswith(TINY_T5) else load(name, *args, **kwargs)

    return from_pretrained


class Plugin:
    """Binds our classes in each test module that pytest collects, if asked to."""

    def __init__(self, files: list[Path], classes: dict[type, type]):
        self.files, self.classes = files, classes

    @pytest.hookimpl(wrapper=True)
    def pytest_pycollect_makemodule(self, module_path: Path) -> Any:
        module = yield
        if module_path in self.files:  # pytest asks for all modules of a folder
            bind_module(module.obj, self.classes)
        return module


def run_tests(folder: Path, classes: dict[type, type], arguments: list[str]) -> int:
    """One run, in this process; diffusers is imported before, or their conftest would bring that of the checkout."""
    import diffusers  # noqa: F401

    make_tiny_t5()
    for reference, ours in classes.items():
        ours.__name__ = reference.__name__
    files = [folder / "tests" / file for file in FILES if (folder / "tests" / file).exists()]
    options = ["-q", "--rootdir", str(folder), "-c", "/dev/null", "-p", "no:cacheprovider", "--tb=short"]
    return pytest.main([*map(str, files), *options, *arguments], plugins=[Plugin(files, classes)])


def results_of(report: Path) -> dict[str, tuple[str, str]]:
    """How each test ended, and the last line of why, by its name."""
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname').rpartition('tests.')[2]}::{case.get('name')}"
        ended = [child for child in case if child.tag in ("failure", "error", "skipped")]
        said = (ended[0].get("message") or "").strip().splitlines() if ended else []
        results[name] = (ended[0].tag if ended else "passed", said[0][:200] if said else "")
    return results


def compare(reference: dict[str, tuple[str, str]], ours: dict[str, tuple[str, str]]) -> tuple[list[str], bool]:
    """What to print, and whether ours does all that the reference does."""
    lines, worse = [], False
    for title, results in (("diffusers", reference), ("ours", ours)):
        counts = Counter(outcome for outcome, _ in results.values())
        lines.append(f"{title:<10} " + ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())))
    for name in sorted(reference.keys() | ours.keys()):
        before, after = reference.get(name, ("absent", "")), ours.get(name, ("absent", ""))
        if before[0] != after[0]:
            lines.append(f"  {before[0]} -> {after[0]}  {name}: {(after[1] or before[1])}")
            worse |= before[0] == "passed"
    return lines, worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a checkout of diffusers, or a folder that holds its tests")
    parser.add_argument("-k", dest="keyword", default="", help="as pytest's")
    parser.add_argument("--keep", type=Path, help="a folder for both runs' output")
    parser.add_argument("--pipelines-only", action="store_true", help="the tests' models stay diffusers' own classes")
    parser.add_argument("--run", choices=("diffusers", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.folder / "tests" / FILES[0]).exists():
        parser.error(f"{options.folder} has no tests/{FILES[0]}: a checkout of diffusers is needed")
    keyword = ["-k", options.keyword] if options.keyword else []
    if options.run:
        classes = our_classes(options.pipelines_only) if options.run == "ours" else {}
        return run_tests(options.folder.resolve(), classes, [f"--junitxml={options.report}", *keyword])
    with tempfile.TemporaryDirectory() as scratch:
        folder, results = options.keep or Path(scratch), []
        folder.mkdir(parents=True, exist_ok=True)
        for which in ("diffusers", "ours"):
            report = folder / f"{which}.xml"
            command = [sys.executable, "-m", "tools.run_diffusers_tests", str(options.folder.resolve())]
            command += ["--pipelines-only"] * options.pipelines_only
            with (folder / f"{which}.txt").open("w") as output:
                run = [*command, "--run", which, "--report", str(report.resolve()), *keyword]
                subprocess.run(run, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False)
            if not report.exists():
                print((folder / f"{which}.txt").read_text()[-4000:])
                return 2
            results.append(results_of(report))
    lines, worse = compare(*results)
    print("\n".join(lines))
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
