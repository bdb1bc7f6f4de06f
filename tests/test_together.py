"""Servers, their workers and other processes on one store: each acknowledged change is in the next answer."""

import os
import re
import signal
import subprocess
import sys

import pytest
from support import ACCOUNT, MODULE

import wmi

PROCESSES, IMAGES = 6, 6

# What each of the six does: add, modify and delete on the store, and ask a server after each step.
WORK = """
import random, sys
sys.path.insert(0, sys.argv[1])
import wmi

store, name, count, urls = sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5:]
clients = [wmi.Client(url, "a-shpoolxx", version="12.03") for url in urls]
pick = random.Random(name).choice
with wmi.open_storage(store) as storage:
    operator = wmi.Catalog(storage, version="12.03")
    for number in range(count):
        id = operator.register({"id": f"wmi-{name}x{number}", "account_id": "a-shpoolxx", "description": "new"})
        assert pick(clients).show(id)["description"] == "new"
        operator.modify(id, description=f"changed {number}")
        assert pick(clients).show(id)["description"] == f"changed {number}"
        pick(clients).update(id, display_name="by a server")
        assert operator.show(id)["display_name"] == "by a server"
        if number % 3 == 0:
            operator.destroy(id)
            assert pick(clients).show(id)["state"] == "deleted"
"""


def start_server(store, folder):
    """Return a server of two worker processes on any free port, and its URL."""
    process = subprocess.Popen(
        [sys.executable, MODULE, "serve", "--store", store, "--port", "0", "--workers", "2", "--log", "-"],
        cwd=folder, stderr=subprocess.PIPE, text=True,
    )
    url = re.search(r"http://[0-9.:]+", process.stderr.readline())
    assert url, process.stderr.read()
    return process, url[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
@pytest.mark.parametrize("store", ["json:images.json", "sqlite:images.db"])
def test_six_processes_beside_two_servers(store, tmp_path):
    """Six processes add, modify and delete beside two servers of two workers: nothing is lost, doubled or late."""
    location = store.replace("images", str(tmp_path / "images"))
    servers = [start_server(location, tmp_path) for _ in range(2)]
    try:
        urls = [url for _, url in servers]
        command = [sys.executable, "-c", WORK, os.path.dirname(wmi.__file__), location]
        workers = [
            subprocess.Popen([*command, f"p{number}", str(IMAGES), *urls], stderr=subprocess.PIPE, text=True)
            for number in range(PROCESSES)
        ]
        failures = [worker.communicate(timeout=120)[1] for worker in workers]
        assert failures == [""] * PROCESSES
        for url in urls:
            client = wmi.Client(url, ACCOUNT, version="12.03")
            assert client.index().total == PROCESSES * IMAGES
            alive = [image["id"] for image in client.images(state="alive")]
            assert len(alive) == len(set(alive)) == PROCESSES * IMAGES - PROCESSES * len(range(0, IMAGES, 3))
        with wmi.open_storage(location) as storage:
            assert list(storage.check()) == []
            assert len(list(storage.walk())) == PROCESSES * IMAGES
    finally:
        for process, _ in servers:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(20) for process, _ in servers]
        for process, _ in servers:
            process.stderr.close()
    assert codes == [0, 0]
