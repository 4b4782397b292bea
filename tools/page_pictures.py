"""Makes the pictures of the page in docs/pictures: `python -m tools.page_pictures`, with Chromium and playwright.

A server of the demo model makes a few videos; the page that shows them is photographed wide and narrow. `--at ADDRESS`
takes the page of a server that runs already, as it is.
"""

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from io import BytesIO
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
# Debian's Chromium must be told not to look around the network.
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
SIZES = {"page": (1280, 1040, "light"), "page-narrow": (380, 1160, "dark")}
SHOWS_ALL = (
    "document.querySelector('#video').currentTime > 0.9"
    " && [...document.querySelectorAll('#gallery img')].every((image) => image.complete && !image.hidden)"
)
PAUSES = """() => {
    const video = document.querySelector("#video"), facts = document.querySelector("#facts");
    video.pause();
    video.controls = false;
    // That says something of the machine alone.
    facts.textContent = facts.textContent.replace(/ · made in .*/, "");
}"""
# With seeds.
PROMPTS = [
    ("a red circle moves right on a white background", 0),
    ("on a pink background, a blue square slides left", 1),
    ("a green triangle moves up on a white background", 2),
    ("a purple circle drifts down, white background", 4),
    ("a blue star moves up on a gray background", 5),
    ("an orange star moves left on a black background", 3),
]


def find_chromium():
    """The path of a Chromium that is installed; None: there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextlib.contextmanager
def running():
    """The address of a server of the demo model in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from cogvx_fast.cli import main; main()", "serve", "--port", "0"]
        process = subprocess.Popen([*command, "--folder", folder], stdout=subprocess.PIPE, text=True)
        try:
            address = re.match(r"http://[0-9.:]+", process.stdout.readline())[0]
            process.stdout.readline()
            yield address
        finally:
            process.terminate()
            process.wait()


def make_videos(address):
    for prompt, seed in PROMPTS:
        body = {"prompt": prompt, "seed": seed}
        request = urllib.request.Request(
            f"{address}/v1/videos", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            video = json.load(answer)
        while video["status"] in ("queued", "in_progress"):
            time.sleep(0.2)
            with urllib.request.urlopen(f"{address}/v1/videos/{video['id']}") as answer:
                video = json.load(answer)


def photograph(address, folder):
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        for name, (width, height, scheme) in SIZES.items():
            size = {"width": width, "height": height}
            page = browser.new_page(viewport=size, color_scheme=scheme, device_scale_factor=1.5)
            page.goto(address)
            while not page.evaluate(SHOWS_ALL):  # a question from outside: the page's policy lets no text be run in it
                page.wait_for_timeout(50)
            page.evaluate(PAUSES)
            path = folder / f"{name}.webp"
            Image.open(BytesIO(page.screenshot())).save(path, quality=82, method=6)
            print(path, path.stat().st_size)
            page.close()
        browser.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at", help="address of a server that runs already")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    with contextlib.nullcontext(options.at) if options.at else running() as address:
        if not options.at:
            make_videos(address)
        photograph(address, options.folder)


if __name__ == "__main__":
    main()
