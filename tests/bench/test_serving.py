"""Servers under load: arrivals, what is counted, rows and what they say; no server is started."""

import contextlib
import http.server
import itertools
import json
import threading
import time

import pytest

from cogvx_fast.bench import serving_gate, serving_run
from cogvx_fast.bench.accuracy import Verdict
from cogvx_fast.bench.report import NOTHING, readme_section, report, serving_section, write_plots
from cogvx_fast.bench.results import append, latest, read
from cogvx_fast.bench.rows import RowError
from cogvx_fast.bench.serving import Serving
from cogvx_fast.bench.serving_clients import OursCall, PostCall, RequestError
from cogvx_fast.bench.serving_load import Load, Outcome, arrivals, drive, percentile

from .conftest import row

MP4 = b"\0\0\0\x20ftypisom"


def serving_row(contender, rate, p95, gate="green", **extras):
    figures = {
        "rate_per_second": rate,
        "duration_seconds": 60.0,
        "patience_seconds": 60.0,
        **{"sent": 30, "ended": 30, "errors": 0, "open": 0},
        "throughput_per_second": rate,
        **{f"{what}_p{percent}_seconds": p95 for what in ("first_event", "done") for percent in (50, 95, 99)},
        **extras,
    }
    nothing = dict.fromkeys(
        ("p20_seconds", "p50_seconds", "p80_seconds", "first_call_seconds", "peak_memory_bytes"), None
    )
    shapes = {"batch": 1, "num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 20, "guidance_scale": 6.0}
    fields = {"series": "serving", "workload": "serving-demo", "stage": f"{rate:.3g}/s", "n": 30, "shapes": shapes}
    red = {"error": 2.0, "extras": {}} if gate == "red" else {"extras": figures}
    return row(contender, **{**nothing, **fields, "gate": gate, "command": "cogvx-fast bench serve", **red})


ROWS = [
    serving_row("ours", 0.2, 0.5),
    serving_row("baseline", 0.2, 1.0),
    serving_row("ours", 0.5, 0.6),
    serving_row("baseline", 0.5, 2.5),
]


def test_arrivals_are_poisson_and_the_same_for_the_same_seed():
    found = arrivals(5.0, 2000.0, 1)
    assert found == arrivals(5.0, 2000.0, 1) != arrivals(5.0, 2000.0, 2)
    gaps = [after - before for before, after in itertools.pairwise(found)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.2, rel=0.03) and deviation == pytest.approx(0.2, rel=0.05), "exponential"
    assert found == sorted(found) and found[-1] < 2000


def test_percentiles_count_what_is_not_over():
    times = [float(number) for number in range(1, 101)]
    assert [percentile(times, p, 60.0) for p in (50, 95, 99)] == [50.0, 95.0, 99.0]
    assert percentile([1.0, 2.0, None, None], 50, 60.0) == 2.0
    assert percentile([1.0, 2.0, None, None], 75, 60.0) == 60.0
    assert percentile([1.0, 70.0, None], 99, 60.0) == 70.0, "longer than all that is known"
    assert percentile([], 50, 60.0) == 0.0


class Slow:
    """Answers after `seconds`; requests that are given up end at once."""

    given_up = 0

    def __init__(self, seconds, error=""):
        self.seconds, self.error, self.ended = seconds, error, threading.Event()

    def make(self, asked, first):
        first()
        if self.ended.wait(self.seconds):
            raise RequestError("given up")
        if self.error:
            raise RequestError(self.error)
        return MP4

    def give_up(self):
        Slow.given_up += 1
        self.ended.set()


def test_requests_are_sent_when_they_are_due_whether_or_not_others_are_answered():
    calls = iter([Slow(0.3), Slow(0.01), Slow(0.0, "no"), Slow(60)])
    before, Slow.given_up = time.monotonic(), 0
    load = drive(lambda: next(calls), [{}] * 4, [0.0, 0.05, 0.1, 0.15], seconds=0.2, patience=0.4)
    assert time.monotonic() - before < 5 and Slow.given_up == 1
    first, second, third, last = load.outcomes
    assert second.due + second.done < first.done, "the second did not wait for the first"
    assert first.done >= 0.3 and third.error == "no" and last.done is None and last.error == ""
    figures = load.figures()
    assert [figures[name] for name in ("sent", "ended", "errors", "open")] == [4, 2, 1, 1]
    assert figures["done_p50_seconds"] == first.done and figures["done_p99_seconds"] == 0.4
    assert figures["throughput_per_second"] == pytest.approx(1 / 0.2), "one was there in time"


def test_what_is_no_video_is_an_error():
    class Wrong(Slow):
        def make(self, asked, first):
            return b"{}"

    load = drive(lambda: Wrong(0), [{}], [0.0], seconds=0.01, patience=1.0)
    assert load.errors == ["what came is no MP4"] and load.figures()["done_p50_seconds"] == 0.0


@pytest.fixture
def server():
    """Speaks as both kinds of servers do; `asked` are the requests."""

    class Answers(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body, self.headers.get("Authorization")))
            if body.get("seed") == 13:
                self.answer(b'{"error": {}}', 429)
            else:
                self.answer(MP4 if self.path == "/videos" else b'{"id": "video_1"}')

        def do_GET(self):
            asked.append((self.path, None, self.headers.get("Authorization")))
            if self.path.endswith("/events"):
                end = "failed" if any(body and "fail" in body["prompt"] for _, body, _ in asked) else "completed"
                self.answer(f'event: queued\ndata: {{}}\n\nevent: {end}\ndata: {{"error": "why"}}\n\n'.encode())
            elif self.path == "/v1/models":
                self.answer(b'{"data": [{"id": "demo"}]}')
            elif self.path == "/v1/videos/video_1":
                self.answer(b'{"engine": "exact", "engine_report": "attention: on"}')
            else:
                self.answer(MP4)

        def answer(self, data, status=200):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        running.asked, running.url = asked, f"http://127.0.0.1:{running.server_port}"
        yield running
        running.shutdown()


def test_a_job_is_followed_by_its_events_and_fetched(server):
    heard = []
    assert OursCall(server.url, "key").make({"prompt": "a"}, lambda: heard.append(1)) == MP4
    assert heard == [1]
    assert [path for path, *_ in server.asked] == [
        *("/v1/videos", "/v1/videos/video_1/events", "/v1/videos/video_1/content")
    ]
    assert {key for *_, key in server.asked} == {"Bearer key"}
    with pytest.raises(RequestError, match="failed: why"):
        server.asked.clear()
        OursCall(server.url).make({"prompt": "fail"}, lambda: None)
    with pytest.raises(RequestError, match="answered 429"):
        OursCall(server.url).make({"prompt": "a", "seed": 13}, lambda: None)


def test_a_baseline_is_heard_of_when_it_answers(server):
    heard = []
    assert PostCall(server.url).make({"prompt": "a"}, lambda: heard.append(1)) == MP4 and heard == [1]
    server.shutdown()
    server.server_close()
    with pytest.raises(RequestError, match="the connection broke"):
        PostCall(server.url).make({"prompt": "a"}, lambda: None)


FIELDS = {"width": 64, "height": 64, "num_frames": 17, "num_inference_steps": 20, "guidance_scale": 6.0, "fps": 8}


@pytest.fixture
def planned(server, monkeypatch, tmp_path):
    """Runs a plan on servers that answer at once; `verdict` is what the gate says of ours."""

    @contextlib.contextmanager
    def started(*arguments):
        yield server.url

    monkeypatch.setattr(serving_run, "ours", started)
    monkeypatch.setattr(serving_run, "by_hand", started)

    def go(gate="green", **values):
        ours = Verdict(gate, "so it is", 0.1, 0.1, 0.11)
        judged = serving_gate.Judged(ours, Verdict("green", "itself", 0.1, 0.1, 0.11), 50.0, 3)
        monkeypatch.setattr(serving_gate, "compare", lambda *_: judged)
        plan = serving_run.ServingPlan("folder", "bfloat16", "cpu", "bench serve", FIELDS, seconds=0.3, **values)
        told = []
        return serving_run.run(plan, tell=told.append), told

    return go


def test_a_run_asks_both_at_each_rate_at_the_same_moments(planned, server, tmp_path):
    rows, _ = planned(rates=[20.0, 10.0], patience=5.0, baseline=tmp_path)
    assert [(one.stage, one.contender) for one in rows] == [
        *(("10/s", "ours"), ("10/s", "baseline"), ("20/s", "ours"), ("20/s", "baseline"))
    ]
    for one in rows:
        append(tmp_path / "rows.jsonl", one)
        assert (
            one.gate == "green" and one.extras["errors"] == one.extras["open"] == 0 and one.workload == "serving-demo"
        )
        assert one.n == one.extras["sent"] == len(arrivals(one.extras["rate_per_second"], 0.3, 0))
        assert one.extras["psnr_to_the_other_db"] == 50.0
    assert rows[0].engine == {"tier": "exact"} and rows[0].engine_report == ["attention: on"] and not rows[1].engine
    asked = [body for path, body, _ in server.asked if path == "/videos"]
    assert asked[0] == {"prompt": asked[0]["prompt"], "seed": 0, **FIELDS} and asked[1]["seed"] == 1


def test_rates_are_parts_of_what_the_baseline_can_make(planned, tmp_path):
    rows, told = planned(loads=[0.01, 0.02], patience=5.0, baseline=tmp_path)
    rates, capacity = [one.extras["rate_per_second"] for one in rows[::2]], rows[0].extras["capacity_per_second"]
    assert rates == pytest.approx([0.01 * capacity, 0.02 * capacity]) and "how long a video takes baseline" in told


def test_no_rate_is_asked_where_videos_differ(planned, tmp_path):
    rows, told = planned("red", rates=[10.0], baseline=tmp_path)
    assert [(one.contender, one.gate, one.extras) for one in rows] == [("ours", "red", {})]
    assert not [text for text in told if "requests" in text]


def test_a_server_alone_is_not_judged_and_says_so(planned):
    rows, _ = planned(rates=[10.0], patience=5.0, url=None)
    assert [(one.gate, one.gate_detail) for one in rows] == [("none", "not judged: no baseline beside it")]


def test_what_is_open_is_given_up_and_the_server_brought_to_rest(planned, server, monkeypatch, tmp_path):
    answered, restarted = PostCall.make, []
    left = [10]

    def make(self, asked, first):
        left[0] -= 1
        if left[0] in (0, 1):
            time.sleep(1.0)
        return answered(self, asked, first)

    @contextlib.contextmanager
    def started(*arguments):
        restarted.append(1)
        yield server.url

    monkeypatch.setattr(serving_run, "by_hand", started)
    monkeypatch.setattr(PostCall, "make", make)
    rows, _ = planned(rates=[20.0], patience=0.1, baseline=tmp_path)
    assert rows[1].extras["open"] >= 1 and len(restarted) == 2


def test_rows_state_all_or_nothing(tmp_path):
    for one in (*ROWS, serving_row("ours", 1.0, 1.0, gate="red")):
        append(tmp_path / "rows.jsonl", one)
    assert len(read(tmp_path / "rows.jsonl")) == 5
    partly = serving_row("ours", 1.0, 1.0)
    del partly.extras["open"]
    with pytest.raises(RowError, match="open is missing"):
        append(tmp_path / "rows.jsonl", partly)
    red = serving_row("ours", 1.0, 1.0, gate="red")
    red.extras["done_p50_seconds"] = 1.0
    with pytest.raises(RowError, match="no latency may be stated"):
        append(tmp_path / "rows.jsonl", red)


def test_the_target_is_judged_where_the_baseline_has_doubled():
    (series,) = latest(ROWS)
    assert isinstance(series, Serving)
    expected = "At 0.5/s the baseline's p95 has doubled (1.00 s to 2.50 s); ours is 600 ms, 0.24x of it"
    assert series.verdict().startswith(expected) and "is reached" in series.verdict()
    missed = latest([*ROWS[:2], serving_row("ours", 0.5, 1.3), ROWS[3]])[0]
    assert "0.52x" in missed.verdict() and "is NOT reached" in missed.verdict()
    assert "doubles at none" in latest(ROWS[:2])[0].verdict()
    assert latest([ROWS[0]])[0].verdict() == ""


def test_pages_show_them(tmp_path):
    pytest.importorskip("matplotlib")
    bound = serving_row("baseline", 1.0, 60.0, ended=20, open=10)
    rows = [*ROWS, bound, serving_row("ours", 1.0, 0.9, errors=2)]
    page = serving_section(rows, "plots")
    assert "17 frames of 64x64, 20 steps, guidance 6" in page and "](plots/serving-demo-bfloat16-serving" in page
    times = "60.0 s | over 60.0 s | over 60.0 s"
    assert f"| 1/s | baseline | 30 | 20 | 0 | 10 | {times} | {times} | 1.00 |" in page
    assert page.split("\n\n")[1] in report(rows, "plots")
    assert serving_section([row()], "plots") == NOTHING and "serving" not in readme_section(rows, "x")
    (path,) = write_plots(rows, tmp_path)
    assert path.stat().st_size > 10_000
    refused = serving_section([serving_row("ours", 0.2, 1.0, gate="red")], "plots")
    assert "refused: mean over 3 inputs" in refused


def test_load_is_what_its_outcomes_are():
    load = Load(10.0, 5.0, [Outcome(1.0, 0.0, 0.1, 2.0), Outcome(9.0, 0.01, 0.2, 4.0)])
    figures = load.figures()
    assert figures["throughput_per_second"] == 0.1 and figures["latest_send_seconds"] == 0.01
    assert (figures["first_event_p95_seconds"], figures["done_p50_seconds"]) == (0.2, 2.0)
