"""Small text files for the tests of parallel texts."""

from pathlib import Path


def write(folder: Path, **files: list[str] | str | bytes) -> Path:
    """Files whose names have _ for the last dot; a list is its lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, end = name.rpartition("_")
        if isinstance(content, list):
            content = "".join(line + "\n" for line in content)
        (folder / f"{stem}.{end}").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder
