"""A hub on this machine: one repository, by the addresses that `huggingface_hub` and `datasets` ask for."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "a" * 40


@contextmanager
def hub(repository: Path) -> Iterator[tuple[str, list[str]]]:
    """(its address, for HF_ENDPOINT; the files that are asked for). Every name of a dataset or a model is answered with
    `repository`, every revision with what lies there now."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            address = urlparse(unquote(self.path))
            parts = address.path.strip("/").split("/")
            if parts[0] == "api":
                self.describe(parts[4:], parse_qs(address.query))
            elif "resolve" in parts and (path := repository.joinpath(*parts[parts.index("resolve") + 2 :])).is_file():
                self.hand_over(path)
            else:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def describe(self, what: list[str], query: dict[str, list[str]]) -> None:
            if what[:1] == ["tree"]:
                folder = repository.joinpath(*what[2:])
                recursive = query.get("recursive") in (["true"], ["True"])
                found = [entry(path) for path in sorted(folder.rglob("*") if recursive else folder.glob("*"))]
                error = {} if found else {"X-Error-Code": "EntryNotFound"}
                self.answer(200 if found else 404, json.dumps(found).encode(), error)
            else:
                files = [{"rfilename": entry(path)["path"]} for path in sorted(repository.rglob("*")) if path.is_file()]
                about = {"id": "org/web", "sha": COMMIT, "siblings": files, "tags": []}
                self.answer(200, json.dumps(about).encode(), {})

        def hand_over(self, path: Path) -> None:
            body = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if self.command == "GET":
                asked.append(path.name)
            part = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if part is None:
                self.answer(200, body, headers)
            else:
                start, end = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
                self.answer(206, body[start : end + 1], headers)

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    def entry(path: Path) -> dict[str, object]:
        name = path.relative_to(repository).as_posix()
        size = path.stat().st_size if path.is_file() else 0
        kind = "file" if path.is_file() else "directory"
        return {"type": kind, "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
