"""What tests find in folders."""

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Returns every file below `folder` with its bytes."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
