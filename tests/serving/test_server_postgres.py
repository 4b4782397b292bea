"""A whole server whose jobs are in PostgreSQL: a worker is killed, and its end is said."""

import pytest

from tests.serving import postgres
from tests.serving.conftest import SMALL
from tests.serving.process import PROMPT, Server, until
from tests.serving.test_callbacks import receiver

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]

LONG = {"num_inference_steps": 60, "seed": 3, **SMALL}


def test_a_worker_that_is_killed_loses_nothing_and_its_end_is_said(tmp_path):
    with postgres.running() as database, receiver(200) as (host, got):
        options = ("--device", "cpu", "--callback-host", host)
        server = Server(tmp_path / "folder", *options, store=database)
        try:
            url = f"http://{host}/hook"
            whole = server.make(**LONG)
            server.wait(whole)
            killed = server.make(callback_url=url, **LONG)
            server.kill_its_worker_in_the_middle_of(killed, 30)
            job = server.wait(killed)
            assert job.result["made_steps"] <= 31, "it goes on, at most a step before the last"
            assert server.video(killed) == server.video(whole)
            until(lambda: got)
            _, headers, body = got[0]
            secret = (server.folder / "callback-secret").read_text().strip()
            found = server.client.webhooks.unwrap(body, headers, secret=secret)
            assert (found.type, found.data.id) == ("video.completed", killed)

            waiting = server.client.videos.create(prompt=PROMPT, extra_body=LONG).id
            until(lambda: server.store.get(waiting).done >= 5)
            server.end()
            server.start()
            assert server.wait(waiting).kills == 0
            assert server.video(waiting) == server.video(whole)
            assert [video.id for video in server.client.videos.list(order="asc")] == [whole, killed, waiting]
            assert len(got) == 1 and not server.store.outbox.due()
        finally:
            server.end()
    assert not (tmp_path / "folder" / "jobs.sqlite").exists()
