"""The test servers themselves: gone with the run that started them, whatever happens to it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from botocore.exceptions import ClientError

from tests.support.mounts import wait_until
from tests.support.servers import MinistackServer, Server

_RUN = """
import sys, time
from pathlib import Path
from tests.support.servers import MinistackServer
server = MinistackServer(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
sys.stdin.read()
"""


def test_a_server_dies_with_its_test_run(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert run.stdin is not None
    assert run.stdout is not None
    try:
        pid = int(run.stdout.readline())
        watch = os.pidfd_open(pid)
        try:
            assert select.select([watch], [], [], 0)[0] == []
            run.send_signal(signal.SIGKILL)
            assert select.select([watch], [], [], 30)[0] == [watch]
        finally:
            os.close(watch)
    finally:
        run.kill()
        run.wait()
        run.stdin.close()
        run.stdout.close()


def test_a_server_comes_back_with_its_data(seaweed: Server) -> None:
    seaweed.create_bucket("comes-back")
    with seaweed.client() as client:
        client.put_object(Bucket="comes-back", Key="k", Body=b"data")
        seaweed.kill()
        assert not seaweed.answers()
        seaweed.restart()

        def read() -> bytes | None:
            try:
                return client.get_object(Bucket="comes-back", Key="k")["Body"].read()
            except ClientError:
                return None  # it answers before its own parts have found each other

        wait_until(lambda: read() is not None, "the server finds its data")
        assert read() == b"data"


def test_a_paused_server_does_not_answer(tmp_path: Path) -> None:
    with MinistackServer(tmp_path) as server:
        assert server.answers()
        server.pause()
        assert not server.answers()
        server.resume()
        assert server.answers()
