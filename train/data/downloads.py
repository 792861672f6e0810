"""Files of known data sets, fetched once and compared with their published checksums."""

from pathlib import Path

from train.data import DataError


def folder_of(name: str, directory: Path | str | None = None) -> Path:
    """The folder of a set: the directory, or one in the user's cache if it is None."""
    import pooch

    return Path(directory) if directory is not None else Path(pooch.os_cache("functree")) / name


def fetch(address: str, checksum: str, folder: Path, members: tuple[str, ...] | None = ()) -> None:
    """Put the file of an address into the folder, unless it is there already and whole.

    Args:
        checksum: "md5:..." or "sha256:...".
        members: files of an archive that are unpacked beside it: none if empty, all if None.

    Raises DataError: no connection, or another checksum.
    """
    import pooch

    unpack = pooch.Untar(members and list(members), extract_dir=".") if members != () else None
    try:
        pooch.retrieve(address, known_hash=checksum, fname=address.rpartition("/")[2], path=folder, processor=unpack)
    except ValueError:
        kind, _, value = checksum.partition(":")
        sum_of = {"md5": "MD5", "sha256": "SHA-256"}[kind]
        raise DataError(f"{address} is not the published file: its {sum_of} sum differs from {value}") from None
    except Exception as error:  # the network library raises anything
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot fetch {address}: {first}") from None
