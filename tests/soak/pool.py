"""The distinct requests of a run, and the video of each: what a quiet server makes of it, before any fault."""

import base64
import hashlib
import itertools
import json
import random
from dataclasses import dataclass, field

STEPS = 4
PROMPTS = ("a red circle moves right", "a blue square moves up", "a green triangle on a black background")
SIZES = ((32, 32, 9), (64, 64, 9), (48, 32, 17), (64, 64, 17))
SCHEDULERS = (None, "ddim", "dpm")
GUIDANCES = (1.0, 1.5)


@dataclass
class Setting:
    """One request, told from the others by its seed, which answers name.

    Attributes:
        fields: of the request's body.
        source: the setting whose video is remixed, or goes along as a reference.
        remix: whether by its id; else its bytes go along.
        id, digest: of the job and the video that the quiet server made of it.
    """

    seed: int
    fields: dict
    source: "Setting | None" = None
    remix: bool = False
    id: str = ""
    digest: str = ""
    video: bytes = field(default=b"", repr=False)

    @property
    def path(self):
        return f"/v1/videos/{self.source.id}/remix" if self.remix else "/v1/videos"

    @property
    def body(self):
        body = {**self.fields, "seed": self.seed}
        if self.source is not None and not self.remix:
            url = "data:video/mp4;base64," + base64.b64encode(self.source.video).decode()
            body["input_reference"] = {"video_url": url}
        return body


def settings(number, seed):
    """So many settings: seven of ten are texts of different sizes, schedulers and guidance; the others go on from one
    of these, as a remix, a remix of its frames, and with its video as a reference."""
    chosen = list(itertools.product(SIZES, SCHEDULERS, GUIDANCES))
    random.Random(seed).shuffle(chosen)
    found = []
    for index in range(number):
        prompt = PROMPTS[index % len(PROMPTS)]
        kind = index % 10
        if kind < 7 or not found:
            (width, height, frames), scheduler, guidance = chosen[index % len(chosen)]
            fields = {"prompt": prompt, "width": width, "height": height, "num_frames": frames}
            fields |= {"num_inference_steps": STEPS, "guidance_scale": guidance, "scheduler": scheduler}
            found.append(Setting(index, fields))
            continue
        source = next(one for one in found[index % 3 :] if one.source is None)
        if kind == 7:
            found.append(Setting(index, {"prompt": prompt}, source, remix=True))
        elif kind == 8:
            found.append(Setting(index, {"prompt": prompt, "strength": 0.5}, source, remix=True))
        else:
            size = {name: source.fields[name] for name in ("width", "height", "num_frames")}
            fields = {"prompt": prompt, "num_inference_steps": STEPS, "strength": 0.75, **size}
            found.append(Setting(index, fields, source))
    return found


def digest_of(data):
    return hashlib.sha256(data).hexdigest()


def make(found, user):
    """Have each made once; sources stand before what goes on from them."""
    for setting in found:
        setting.id = user.create(setting)
        ended = user.wait(setting.id)
        if ended is None or ended["status"] != "completed":
            raise RuntimeError(f"without a fault {json.dumps(setting.fields)} came to {ended}")
        setting.video = user.download(setting.id)
        setting.digest = digest_of(setting.video)
