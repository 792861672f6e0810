"""Files of known data sets, fetched once and compared with their published checksums.

Where none is published, the SHA-256 of the first download is kept beside the file, as `sha256sum` writes it, and
compared from then on.
"""

import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from train.data import DataError
from train.files import replacing


class Download(NamedTuple):
    """A file, its published checksum ("md5:..." or "sha256:...", None if there is none), and the members of it that are
    unpacked (all if None, none if empty)."""

    address: str
    checksum: str | None
    members: tuple[str, ...] | None = ()


def folder_of(name: str, directory: Path | str | None = None) -> Path:
    """The folder of a set: the directory, or one in the user's cache if it is None."""
    import pooch

    return Path(directory) if directory is not None else Path(pooch.os_cache("functree")) / name


def fetch_all(
    name: str, files: Iterable[Download], directory: Path | str | None = None, base_url: str | None = None
) -> Path:
    """Fetch the files of a set and return its folder; files that are there already and whole are not fetched again.

    Args:
        directory: folder to keep them in, `folder_of(name)` if None.
        base_url: another address of files of the same names (their checksums are compared).

    Raises DataError as `fetch`.
    """
    folder = folder_of(name, directory)
    for address, checksum, members in files:
        file = address.rpartition("/")[2]
        fetch(f"{base_url.rstrip('/')}/{file}" if base_url else address, checksum, folder, members)
    return folder


def fetch(address: str, checksum: str | None, folder: Path, members: tuple[str, ...] | None = ()) -> None:
    """Put the file of an address into the folder, unless it is there already and whole.

    Neither the file nor a member of it is there before it is whole, wherever this is interrupted.

    Args:
        checksum: "md5:..." or "sha256:..."; None for that of the first download.
        members: files of an archive (tar or zip) that are unpacked beside it: none if empty, all if None.

    Raises DataError: no connection, a folder that cannot be written, another checksum, a page of HTML in place of a
    file that has none, or a damaged archive.
    """
    import pooch

    name = address.rpartition("/")[2]
    record = folder / f"{name}.sha256"
    first = checksum is None and not record.exists()
    expected = f"sha256:{record.read_text().split()[0]}" if checksum is None and not first else checksum

    def unpack(path: str, action: str, _) -> str:
        fresh = action != "fetch"
        try:
            if first and fresh:
                _check_no_page(address, Path(path))
            if members != ():
                _unpack(Path(path), folder, members, again=fresh)
        except DataError as error:
            if fresh:  # another run fetches it again; what somebody put there stays
                Path(path).unlink()
                raise
            raise DataError(f"{error}; remove it to fetch it again") from None
        return path

    try:
        path = pooch.retrieve(address, known_hash=expected, fname=name, path=folder, processor=unpack)
    except DataError:
        raise
    except ValueError:
        kind, _, value = expected.partition(":")
        sum_of = {"md5": "MD5", "sha256": "SHA-256"}[kind]
        which = "the published file" if checksum else f"the file that was fetched first ({record})"
        raise DataError(f"{address} is not {which}: its {sum_of} sum differs from {value}") from None
    except Exception as error:  # the network library raises anything, OSErrors without a strerror too
        if isinstance(error, OSError) and error.strerror and not isinstance(error, (ConnectionError, TimeoutError)):
            place = f"cannot write {name} into {folder}: {error.strerror}"
            raise DataError(f"{place}; XDG_CACHE_HOME names another folder for downloads") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot fetch {address}: {reason}; without a connection, put {name} into {folder}") from None
    if first:
        with replacing(record) as temporary:
            temporary.write_text(f"{pooch.file_hash(path)}  {name}\n")


def _check_no_page(address: str, path: Path) -> None:
    """Raise DataError for a page in place of a file without a published checksum, as a network's log-in sends it."""
    with path.open("rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise DataError(f"{address} is a page of HTML; expected {path.name}. Does this network want a log-in?")


def _unpack(archive: Path, folder: Path, members: tuple[str, ...] | None, again: bool) -> None:
    """Unpack an archive into a folder of its own, and move each file to its place: those that are missing, or all if
    `again`. Raises DataError."""
    try:
        with zipfile.ZipFile(archive) if archive.suffix == ".zip" else tarfile.open(archive) as file:
            if isinstance(file, zipfile.ZipFile):
                entries = {entry.filename: entry for entry in file.infolist() if not entry.is_dir()}
                options = {}
            else:
                entries = {entry.name: entry for entry in file.getmembers() if entry.isfile()}
                options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
            for name in entries:
                if os.path.isabs(name) or ".." in Path(name).parts:
                    raise DataError(f"{archive} has {name}, outside of its folder")
            absent = [name for name in members or () if name not in entries]
            if absent:
                raise DataError(f"{archive} has no {absent[0]}")
            wanted = [name for name in members or entries if again or not (folder / name).exists()]
            if not wanted:
                return
            with tempfile.TemporaryDirectory(dir=folder) as place:
                file.extractall(place, [entries[name] for name in wanted], **options)
                for path in sorted(Path(place).rglob("*")):
                    if path.is_file():
                        target = folder / path.relative_to(place)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        os.replace(path, target)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise DataError(f"{archive} is truncated or garbled: {error}") from None
