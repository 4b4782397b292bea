import subprocess

import pytest
import torch

from cogvx_fast.bench import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a package and result rows, all committed."""
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))  # as in a hook: must not matter
    files = {"pkg/__init__.py": "", "other.txt": "", "benchmarks/results/a.jsonl": "", ".gitignore": ".venv/\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "all")
    return tmp_path


def git(folder, *arguments):
    environment = {"PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(folder)}
    return subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_clean_checkout(checkout):
    assert provenance.git_state(checkout / "pkg") == (git(checkout, "rev-parse", "HEAD"), False)


@pytest.mark.parametrize("name", ["pkg/__init__.py", "other.txt", "pkg/new.py"])
def test_a_change_or_a_new_file_makes_it_dirty(checkout, name):
    (checkout / name).write_text("changed")
    assert provenance.git_state(checkout / "pkg")[1] is True


def test_result_rows_and_ignored_files_do_not(checkout):
    (checkout / "benchmarks/results/a.jsonl").write_text("{}\n")
    (checkout / "benchmarks/results/b.jsonl").write_text("{}\n")
    (checkout / ".venv").mkdir()
    (checkout / ".venv/file").touch()
    assert provenance.git_state(checkout / "pkg")[1] is False


def test_an_installed_package_is_not_of_the_checkout_around_it(checkout, tmp_path_factory):
    installed = checkout / ".venv" / "pkg"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    assert provenance.git_state(installed) == (None, None)
    outside = tmp_path_factory.mktemp("outside")
    (outside / "__init__.py").touch()
    assert provenance.git_state(outside) == (None, None)


def test_says_what_machine_and_which_versions():
    found = provenance.collect("cpu")
    assert found.device == "cpu" and found.device_name == found.cpu_name and found.cuda is None
    assert found.threads == torch.get_num_threads() and found.cores >= 1
    assert found.versions["torch"] == torch.__version__ and found.versions["python"]


def test_a_gpu_has_its_driver_and_power_limit(monkeypatch):
    asked = []

    def ask(name, fields):
        asked.append(name)
        return ["570.1", "700.00", "[N/A]"]

    properties = type("Properties", (), {"uuid": "abc"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(provenance.gpu, "ask", ask)
    found = provenance._cuda("cuda:1", [{"device": "cuda:0", "name": "A"}, {"device": "cuda:1", "name": "B"}])
    assert found == {
        "device": "cuda:1",
        "name": "B",
        "driver": "570.1",
        "power_limit_watts": 700.0,
        "max_sm_clock_mhz": None,
    }
    assert asked == ["GPU-abc"]
    monkeypatch.setattr(provenance.gpu, "ask", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = provenance._cuda("cuda", [{"device": "cuda:0", "name": "A"}, {"device": "cuda:1", "name": "B"}])
    assert (found["name"], found["power_limit_watts"]) == ("B", None)
