"""What is there at the end, beside what was promised."""

import io
import json
from collections import Counter

import av

from cogvx_fast.serving.files import REFERENCE, VIDEO, Files
from cogvx_fast.serving.retention import Retention
from cogvx_fast.serving.store import Store

from .pool import digest_of
from .users import VARIANTS

KINDS = ("lost", "doubled", "half-written", "other than without faults", "failed", "without a job")


def of_the_answers(user, ledger):
    """Of a server on which all jobs have ended: faults by kind, jobs by status, and how many of them nobody had an
    answer about."""
    found, listed = Counter(), {job["id"]: job for job in _all(user)}
    quiet = {setting.id for setting in ledger.settings}
    unknown = listed.keys() - ledger.jobs.keys() - quiet
    for video_id, record in ledger.jobs.items():
        if record.end == "deleted":
            if video_id in listed:
                ledger.problem(f"{video_id} was deleted and is there again")
                found["doubled"] += 1
        elif video_id not in listed:
            ledger.problem(f"{video_id} is gone")
            found["lost"] += 1
    ends = Counter()
    for video_id, job in listed.items():
        ends[job["status"]] += 1
        if not 0 <= job["seed"] < len(ledger.settings):
            ledger.problem(f"{video_id} is of a request that was to be refused")
            continue
        setting, record = ledger.settings[job["seed"]], ledger.jobs.get(video_id)
        if job["status"] == "completed":
            data = user.download(video_id)
            digest = digest_of(data)
            if record is not None and record.digest and record.digest != digest:
                ledger.problem(f"{video_id} gave two videos")
                found["doubled"] += 1
            if digest != setting.digest:
                ledger.problem(f"{video_id} is not what {setting.fields} gives without faults")
                found["other than without faults"] += 1
                found["half-written"] += not _is_video(data)
        elif job["status"] != "failed" or job["error"]["code"] != "cancelled":
            kind = "failed" if job["status"] == "failed" else "lost"
            ledger.problem(f"{video_id} is {job['status']}: {job['error']}")
            found[kind] += 1
    return found, ends, len(unknown)


def of_the_folder(folder, ledger, ends):
    """Faults by kind in the database and the files of a server that has ended, after the sweeps of a start and two
    minutes; and what those had to remove."""
    found, store, place = Counter(), Store(f"sqlite:///{folder / 'jobs.sqlite'}"), folder / "videos"
    names = {VIDEO, REFERENCE, "thumbnail.webp", "spritesheet.jpg", *(f"video.{variant}" for variant in VARIANTS)}
    try:
        left = sum(1 for _ in place.rglob("*.partial"))
        files = Files(str(place))
        orphans = len(files.job_ids() - store.ids())
        retention = Retention(store, files, 10 * 86400.0, 2**50)
        for _ in range(2):
            if retention.sweep():
                ledger.problem("jobs were removed as old that are not")
                found["lost"] += 1
        found["without a job"] = len(files.job_ids() - store.ids())
        for path in place.rglob("*"):
            if path.is_file() and path.name not in names:
                ledger.problem(f"{path.relative_to(place)} was left")
                found["half-written"] += 1
        totals = store.totals()
        deleted = Counter(record.act for record in ledger.jobs.values() if record.end == "deleted")
        # A job that was deleted early may or may not have been completed before.
        least = ends["completed"] + deleted["deleted when done"]
        most = least + deleted["deleted early"]
        if not least <= totals.get("completed", 0) <= most:
            ledger.problem(
                f"{totals.get('completed')} jobs were completed, {least} to {most} are there or were deleted"
            )
            found["doubled"] += 1
        queued = totals.get("requeued", 0)
    finally:
        store.close()
    return found, {
        "unfinished files swept": left,
        "folders without a job swept": orphans,
        "taken up again": int(queued),
    }


def of_the_log(path):
    """How often the server and its workers logged which error: not faults by themselves, as they say what was done."""
    errors = Counter()
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            errors[f"no JSON: {line[:100]}"] += 1
            continue
        if record["level"] == "error":
            said = record.get("exception", "").strip().splitlines() or [""]
            errors[f"{record['message']}: {said[-1][:120]}"] += 1
    return errors


def _all(user):
    after = ""
    while True:
        page = json.loads(user.ask("GET", f"/v1/videos?limit=100&order=asc{after}")[1])
        yield from page["data"]
        if not page["has_more"]:
            return
        after = f"&after={page['last_id']}"


def _is_video(data):
    try:
        with av.open(io.BytesIO(data)) as container:
            return any(True for _ in container.decode(video=0))
    except av.FFmpegError:
        return False
