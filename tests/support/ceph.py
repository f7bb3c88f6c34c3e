"""A real S3 store for tests: Ceph's gateway with one monitor and one OSD in memory, all under one temp folder.

From Debian's packages ``ceph-mon ceph-osd radosgw ceph-common``; nothing else is needed, root neither.
"""

import contextlib
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.support.processes import free_port, listens, running, wait_until
from tests.support.s3 import Store

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph")

ACCESS_KEY = "modelcache-access"
SECRET_KEY = "modelcache-secret"  # noqa: S105 - of a store that lives for one test run

_CONF = """
[global]
fsid = {fsid}
mon_host = v1:127.0.0.1:{mon}
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
run_dir = {folder}
log_file = {folder}/$name.log
admin_socket = {folder}/$name.asok
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
[mon]
mon_data = {folder}/mon
[osd]
osd_objectstore = memstore
memstore_device_bytes = 1073741824
osd_data = {folder}/osd
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:{rgw}
rgw_crypt_require_ssl = false
"""


def missing() -> tuple[str, ...]:
    """Return the programs that are not installed."""
    return tuple(program for program in PROGRAMS if shutil.which(program) is None)


def available() -> bool:
    """Return whether all programs are installed."""
    return not missing()


@contextlib.contextmanager
def ceph() -> Iterator[Store]:
    """Run a store until the block ends; ready within about 10 s. No process is left, even after a failure."""
    with tempfile.TemporaryDirectory(prefix="modelcache-ceph-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        mon, rgw = free_port(), free_port()
        conf = folder / "ceph.conf"
        fsid, uid = str(uuid.uuid4()), str(uuid.uuid4())
        conf.write_text(_CONF.format(fsid=fsid, mon=mon, rgw=rgw, folder=folder))
        (folder / "mon").mkdir()
        (folder / "osd").mkdir()
        monmap = str(folder / "monmap")
        log = folder / "out.log"
        # Without both, a daemon asks with the fsid of a monitor map that it may not have got yet: "wrong fsid".
        common = ("-c", str(conf), "--monmap", monmap, "--no-mon-config")

        def call(*command: str, must: bool = True) -> str:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            if must and done.returncode:
                raise RuntimeError(f"{command} failed: {done.stdout}{done.stderr}")
            return done.stdout

        def ask(*command: str) -> str:
            # A monitor that has just begun, or is changing its map, may refuse: the caller asks again.
            return call("ceph", "-c", str(conf), *command, must=False).strip()

        call("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{mon}]", "--fsid", fsid, monmap)
        call("ceph-mon", "--mkfs", "-i", "a", *common)
        with contextlib.ExitStack() as servers:
            command = ("ceph-mon", "-f", "-i", "a", "-c", str(conf), "--public-addr", f"v1:127.0.0.1:{mon}")
            monitor = servers.enter_context(running(command, log))
            wait_until(lambda: listens(mon), monitor, log)
            number = wait_until(lambda: ask("osd", "create", uid), monitor, log)
            call("ceph-osd", "-i", number, "--mkfs", "--osd-uuid", uid, *common)
            osd = servers.enter_context(running(("ceph-osd", "-f", "-i", number, *common), log))
            wait_until(lambda: "1 up" in ask("osd", "stat"), osd, log)
            gateway = servers.enter_context(running(("radosgw", "-f", "-n", "client.rgw", *common), log))
            wait_until(lambda: listens(rgw), gateway, log)
            user = ("user", "create", "--uid=tester", "--display-name=tester")
            keys = (f"--access-key={ACCESS_KEY}", f"--secret={SECRET_KEY}")
            call("radosgw-admin", "-n", "client.rgw", *common, *user, *keys)
            yield Store("ceph", f"http://127.0.0.1:{rgw}", ACCESS_KEY, SECRET_KEY)
