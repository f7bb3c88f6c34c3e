"""nginx on 127.0.0.1 that looks like S3 to whoever only reads: objects as files, and canned listings.

It knows no signatures and ignores If-Match and checksums: good for speed, not for truth.
"""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

BUCKET = "models"
_PAGE = 1000

_CONF = """
worker_processes 2;
error_log stderr crit;
pid {root}/nginx.pid;
daemon off;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    tcp_nodelay on;
    keepalive_requests 1000000;
    default_type application/octet-stream;
    types {{ }}
    map $args $page {{
        default "";
        "~continuation-token=page(\\d+)" $1;
        "~list-type=2" 0;
    }}
    client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
    uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
    server {{
        listen 127.0.0.1:{port} backlog=512;
        root {root}/data;
        location / {{
            if ($page != "") {{ rewrite ^ /listing/$page last; }}
        }}
        location /listing/ {{ default_type application/xml; }}
    }}
}}
"""


def available() -> str | None:
    """Return the path of nginx; None where there is none."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def serving(root: Path) -> Iterator[str]:
    """Serve ``root/data`` while the block runs; give the endpoint."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    conf = root / "nginx.conf"
    conf.write_text(_CONF.format(root=root, port=port))
    program = available()
    assert program is not None
    with subprocess.Popen([program, "-c", str(conf), "-p", str(root)], stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def list_files(root: Path, prefix: str) -> None:
    """Write the listing of a prefix, in pages."""
    folder = root / "data" / BUCKET
    files = sorted(path for path in (folder / prefix).rglob("*") if path.is_file())
    target = root / "data/listing"
    target.mkdir(exist_ok=True)
    pages = [files[start : start + _PAGE] for start in range(0, len(files), _PAGE)]
    for number, page in enumerate(pages):
        more = number + 1 < len(pages)
        (target / str(number)).write_text(_listing(folder, prefix, page, f"page{number + 1}" if more else None))


def _listing(folder: Path, prefix: str, files: Sequence[Path], following: str | None) -> str:
    contents = "".join(
        f"<Contents><Key>{escape(str(path.relative_to(folder)))}</Key>"
        f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;{_etag(path)}&quot;</ETag>"
        f"<Size>{path.stat().st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for path in files
    )
    token = f"<NextContinuationToken>{following}</NextContinuationToken>" if following else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{BUCKET}</Name><Prefix>{prefix}</Prefix><KeyCount>{len(files)}</KeyCount><MaxKeys>{_PAGE}</MaxKeys>"
        f"<IsTruncated>{'true' if following else 'false'}</IsTruncated>{token}{contents}</ListBucketResult>"
    )


def _etag(path: Path) -> str:
    """Return what nginx answers for a file: time and size."""
    told = path.stat()
    return f"{int(told.st_mtime):x}-{told.st_size:x}"
