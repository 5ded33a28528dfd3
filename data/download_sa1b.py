"""Fetch the SA-1B tars that a list names. The list is yours: Meta's links are personal and expire after some weeks.

    python data/download_sa1b.py --list data/sa-1b-10p.txt --output data/sa-1b-tars --workers 4
    python data/download_sa1b.py --list data/sa-1b-10p.txt --output data/sa-1b-tars --verify

The second command checks the tars that are already there too.

Each line of the list is a file name and its link, separated by a tab; a header line (file_name, cdn_link) may come
first. Get a list with fresh links at https://ai.meta.com/datasets/segment-anything-downloads/ and keep the lines of the
tars you want.

A file grows as <name>.part and gets its name when its size is what the server announced and its headers read as a whole
tar. Run the command again to resume: finished files are passed over, parts continue where they ended. If anything could
not be fetched, the exit code is 2 and the failed lines stand in a list of the same form (--failed-list).
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sam3_train.data.image_tars import build_tar_table
from sam3_train.errors import UserError, run_cli

FAILED_LIST = "download_failed.txt"
_HEADER = ("file_name", "cdn_link")
_CHUNK = 1 << 20
_NO_RETRY = {400, 401, 403, 404, 410, 451}
_EXPIRED = "the link has expired or is not yours (HTTP 403): get a list with fresh links from the SA-1B download page"


class FetchError(Exception):
    """One attempt failed; another may succeed."""


class PermanentError(Exception):
    """A file that no further attempt will fetch."""


@dataclass(frozen=True)
class Entry:
    """One line of the list."""

    name: str
    link: str

    @property
    def expires_at(self) -> float | None:
        """Unix time in the link's ``oe`` parameter (hexadecimal), if it has one."""
        stamp = urllib.parse.parse_qs(urllib.parse.urlsplit(self.link).query).get("oe", [""])[0]
        return float(int(stamp, 16)) if re.fullmatch(r"[0-9a-fA-F]{6,10}", stamp) else None


@dataclass
class Fetcher:
    """Fetches files into a folder; safe to use from several threads."""

    output: Path
    timeout_s: float = 60.0
    retries: int = 5
    backoff_s: float = 2.0
    on_bytes: Callable[[int], Any] = lambda count: None
    stop: threading.Event = field(default_factory=threading.Event)

    def fetch(self, entry: Entry) -> None:
        """Fetch one file, resuming and retrying.

        Raises:
            PermanentError: With the reason, if it cannot be had.
        """
        part = self.output / f"{entry.name}.part"
        for attempt in range(self.retries + 1):
            if self.stop.is_set():
                raise PermanentError("stopped")
            try:
                self._fetch_once(entry, part)
                break
            except FetchError as error:
                if attempt == self.retries:
                    raise PermanentError(f"{error} ({self.retries + 1} attempts)") from error
                self.stop.wait(self.backoff_s * 2**attempt)
        self._finish(entry, part)

    def _fetch_once(self, entry: Entry, part: Path) -> None:
        """Append what is missing to the part, and check the size that the server announced for the whole file."""
        have = part.stat().st_size if part.exists() else 0
        try:
            with self._open(entry.link, have) as response:
                start, total = _range_of(response, have)
                if "html" in response.headers.get("Content-Type", ""):
                    raise PermanentError("the server sent a web page instead of the file: the link is wrong or expired")
                self._check_disk(None if total is None else total - start)
                with open(part, "r+b" if start else "wb") as file:
                    file.truncate(start)
                    file.seek(start)
                    self._copy(response, file)
                    file.flush()
                    os.fsync(file.fileno())
        except urllib.error.HTTPError as error:
            self._after_http_error(error, part, have)
            return
        except http.client.HTTPException as error:
            raise FetchError(f"the connection broke ({error!r})") from error
        except (TimeoutError, urllib.error.URLError, ConnectionError) as error:
            raise FetchError(f"no connection ({getattr(error, 'reason', error)})") from error
        except OSError as error:
            raise PermanentError(f"{part}: cannot be written ({error.strerror or error})") from error
        if total is not None and part.stat().st_size != total:
            raise FetchError(f"{part.stat().st_size:,} of {total:,} bytes arrived")

    def _open(self, link: str, have: int) -> Any:
        request = urllib.request.Request(link, headers={"User-Agent": "efficientsam3-download"})
        if have:
            request.add_header("Range", f"bytes={have}-")
        return urllib.request.urlopen(request, timeout=self.timeout_s)

    def _after_http_error(self, error: urllib.error.HTTPError, part: Path, have: int) -> None:
        """Deal with a refusal: a part that is already whole is fine, anything else is an error."""
        if error.code == 416:  # nothing behind the part's end
            total = _total_of(error.headers.get("Content-Range", ""))
            if total == have:
                return
            part.unlink(missing_ok=True)
            raise FetchError(f"the part of {have:,} bytes did not fit the file and was removed")
        if error.code == 403:
            raise PermanentError(_EXPIRED)
        if error.code in _NO_RETRY:
            raise PermanentError(f"HTTP {error.code} {error.reason}")
        raise FetchError(f"HTTP {error.code} {error.reason}")

    def _copy(self, response: Any, file: Any) -> None:
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            self.on_bytes(len(chunk))
            if self.stop.is_set():
                raise PermanentError("stopped")

    def _check_disk(self, needed: int | None) -> None:
        free = shutil.disk_usage(self.output).free
        if needed is not None and needed > free:
            raise PermanentError(f"{needed / 1e9:,.2f} GB to fetch, {free / 1e9:,.2f} GB free in {self.output}")

    def _finish(self, entry: Entry, part: Path) -> None:
        if not part.stat().st_size:
            part.unlink()
            raise PermanentError("the server sent an empty file")
        problem = check_file(part, entry.name)
        if problem:
            # The right number of bytes and still no tar: more bytes will not mend it.
            part.unlink()
            raise PermanentError(problem)
        os.replace(part, self.output / entry.name)


def check_file(path: Path, name: str) -> str:
    """Why a fetched file is no whole tar of images, or an empty string; other kinds of files are not looked into."""
    if not name.endswith(".tar"):
        return "" if path.stat().st_size else f"{path}: is empty"
    try:
        build_tar_table(path)
    except UserError as error:
        return str(error)
    return ""


def read_list(path: Path) -> list[Entry]:
    """Parse a list of files and links.

    Raises:
        UserError: If the file is missing or a line is malformed; the message has its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the list cannot be read ({error})") from error
    entries: dict[str, Entry] = {}
    for number, line in enumerate(lines, 1):
        columns = [column.strip() for column in line.split("\t")]
        if not line.strip() or line.startswith("#") or tuple(columns[:2]) == _HEADER:
            continue
        if len(columns) < 2:
            raise UserError(f"{path}, line {number}: expected a name, a tab and a link, got {line[:80]!r}")
        entry = Entry(columns[0], columns[1])
        if not re.fullmatch(r"[\w\-][\w\-. ]*", entry.name):
            raise UserError(f"{path}, line {number}: {entry.name!r} is no plain file name")
        if urllib.parse.urlsplit(entry.link).scheme not in ("http", "https"):
            raise UserError(f"{path}, line {number}: {entry.link[:80]!r} is no http link")
        if entries.get(entry.name, entry) != entry:
            raise UserError(f"{path}, line {number}: {entry.name} has two different links")
        entries[entry.name] = entry
    if not entries:
        raise UserError(f"{path}: the list names no file")
    return list(entries.values())


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    return run_cli(_main, argv)


def _main(argv: list[str] | None) -> int:
    args = _parser().parse_args(argv)
    output = Path(args.output)
    entries = read_list(Path(args.list))
    output.mkdir(parents=True, exist_ok=True)
    pending = _pending(entries, output, args.verify)
    print(f"{len(entries)} files listed, {len(entries) - len(pending)} there, {len(pending)} to fetch")
    expired = [entry for entry in pending if (entry.expires_at or time.time()) < time.time()]
    if expired:
        print(f"warning: by their time stamps {len(expired)} of {len(pending)} links have expired", file=sys.stderr)
    failed = _fetch_all(pending, Fetcher(output, args.timeout, args.retries), args.workers)
    failed_list = Path(args.failed_list) if args.failed_list else output / FAILED_LIST
    if not failed:
        failed_list.unlink(missing_ok=True)
        print(f"all {len(entries)} files are in {output}")
        return 0
    rows = ["\t".join((*_HEADER, "reason"))]
    rows += ["\t".join((entry.name, entry.link, " ".join(reason.split()))) for entry, reason in failed]
    failed_list.write_text("\n".join(rows) + "\n", encoding="utf-8")
    raise UserError.from_problems(
        f"{len(failed)} of {len(entries)} files are missing, listed in {failed_list}",
        [f"{entry.name}: {reason}" for entry, reason in failed],
    )


def _pending(entries: list[Entry], output: Path, with_check: bool) -> list[Entry]:
    """What is still to be fetched; with a check, files that are damaged are set aside and fetched again."""
    pending = []
    for entry in tqdm(entries, desc="verify", unit="file", disable=None if with_check else True):
        path = output / entry.name
        if path.exists() and with_check:
            problem = check_file(path, entry.name)
            if problem:
                print(f"{problem}; kept as {path.name}.damaged, fetching it again", file=sys.stderr)
                os.replace(path, path.with_name(f"{path.name}.damaged"))
        if not path.exists():
            pending.append(entry)
    return pending


def _fetch_all(entries: list[Entry], fetcher: Fetcher, num_workers: int) -> list[tuple[Entry, str]]:
    """Fetch files side by side, each thread taking the next as soon as it is free; returns the failed with reasons."""
    failed: list[tuple[Entry, str]] = []
    lock = threading.Lock()
    with tqdm(desc="download", unit="B", unit_scale=True, disable=None) as bar:

        def count(num_bytes: int) -> None:
            with lock:
                bar.update(num_bytes)

        fetcher.on_bytes = count
        pool = ThreadPoolExecutor(max(1, num_workers))
        jobs = {pool.submit(fetcher.fetch, entry): entry for entry in entries}
        try:
            for job in as_completed(jobs):
                try:
                    job.result()
                except PermanentError as error:
                    failed.append((jobs[job], str(error)))
                    print(f"{jobs[job].name}: {error}", file=sys.stderr)
        except BaseException:
            fetcher.stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return sorted(failed, key=lambda pair: pair[0].name)


def _range_of(response: Any, have: int) -> tuple[int, int | None]:
    """(first byte, size of the whole file) of an answer; a server may ignore the wish for a range."""
    if response.status == 206:
        match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        start = int(match.group(1)) if match else have
        if start != have:
            raise FetchError(f"the server sent byte {start} instead of {have}")
        return start, _total_of(response.headers.get("Content-Range", ""))
    length = response.headers.get("Content-Length")
    return 0, int(length) if length is not None else None


def _total_of(content_range: str) -> int | None:
    match = re.search(r"/(\d+)\s*$", content_range)
    return int(match.group(1)) if match else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", required=True, help="file names and links, e.g. data/sa-1b-10p.txt")
    parser.add_argument("--output", required=True, help="folder for the tars")
    parser.add_argument("--workers", type=int, default=4, help="files at a time (default: 4)")
    parser.add_argument("--verify", action="store_true", help="check the tars that are already there too")
    parser.add_argument("--retries", type=int, default=5, help="attempts after the first, per file (default: 5)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds without a byte (default: 60)")
    parser.add_argument("--failed-list", help=f"where failed lines go (default: {FAILED_LIST} in --output)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
