"""A toy checkpoint that tests may damage."""

import json
import shutil

import pytest
import torch

from tests import toy


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "toy"
    toy.pipeline().to(torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "toy")


@pytest.fixture
def changed(folder):
    """Changes a JSON file of the checkpoint: `changed("vae/config.json", in_channels=4)`."""

    def change(name, **values):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))
        return folder

    return change
