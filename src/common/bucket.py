"""Archives that are no folder of this machine: whatever fsspec reaches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import fsspec  # type: ignore[import-untyped]
from fsspec.registry import known_implementations  # type: ignore[import-untyped]

from src.common.archive import DIGEST, MARK, File, at_once
from src.common.exceptions import ConfigurationError


def open_bucket(url: str) -> Bucket:
    """Touches nothing. Raises ConfigurationError where the package for such a URL is not installed."""
    for protocol in url.partition("://")[0].split("::"):
        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            package = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
            install = f"; run: .venv/bin/python -m pip install {package}" if package not in ("", "fsspec") else ""
            raise ConfigurationError(f"RAW_ARCHIVE={protocol}://…: {error}{install}") from None
    return Bucket(url)


@dataclass(frozen=True)
class Bucket:
    """Anything fsspec reaches (s3://, gs://, abfs://, sftp://, …); how whole and durable a write is, is the backend's word.

    There is no lock: a mail that is kept anew in the very moment in which a sweep removes it would be lost.
    """

    url: str

    @cached_property
    def _at(self) -> tuple[Any, str]:
        """(file system, path of the archive in it); reached at the first use, so an archive that is away is waited for."""
        system, root = fsspec.core.url_to_fs(self.url)
        return system, root.rstrip("/")

    @property
    def place(self) -> str:
        url = urlsplit(self.url.rpartition("::")[2])
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"

    def begun(self) -> bool:
        with _foreign():
            system, root = self._at
            system.invalidate_cache()
            return bool(system.exists(f"{root}/{MARK}"))

    def put(self, files: Sequence[File]) -> None:
        with _foreign():
            at_once(self._put, files)
        if not self.begun():
            with _foreign():
                self._put((MARK, b""))

    def _put(self, file: File) -> None:
        system, root = self._at
        target, data = f"{root}/{file[0]}", bytes(file[1])
        try:
            system.pipe_file(target, data)
        except FileNotFoundError:  # where folders exist they have to be made first; object stores have none
            system.makedirs(target.rpartition("/")[0], exist_ok=True)
            system.pipe_file(target, data)

    def read(self, path: str) -> bytes | None:
        try:
            with _foreign():
                system, root = self._at
                return bytes(system.cat_file(f"{root}/{path}"))
        except FileNotFoundError:
            return None

    def files(self) -> Iterator[tuple[str, float]]:
        with _foreign():
            system, root = self._at
            system.invalidate_cache()
            found = list(system.find(root))
        for name in found:
            path = name.removeprefix(f"{root}/")
            if DIGEST.fullmatch(path.rpartition("/")[2]):
                with suppress(FileNotFoundError):
                    yield path, self._modified(path)

    def _modified(self, path: str) -> float:
        with _foreign():
            system, root = self._at
            modified: datetime = system.modified(f"{root}/{path}")
            return (modified if modified.tzinfo else modified.replace(tzinfo=UTC)).timestamp()

    def refresh(self, path: str, now: float) -> None:
        """Written anew: object stores cannot set a time."""
        data = self.read(path)
        if data is not None:
            self.put([(path, data)])

    def remove_older(self, path: str, moment: float) -> bool:
        with suppress(FileNotFoundError):
            if self._modified(path) < moment:
                with _foreign():
                    system, root = self._at
                    system.rm_file(f"{root}/{path}")
                return True
        return False


@contextmanager
def _foreign() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # each backend of fsspec has errors of its own, with no common root
        raise OSError(None, f"{type(error).__name__}: {error}") from error
