"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from kvferry.errors import InputError


def write_whole(path: str | Path, data: bytes | str, *, secret: bool = False, new: bool = False) -> None:
    """Write a file in one step: a full disk, a kill or a power cut leaves what was there before, never a part.

    Parameters
    ----------
    data : bytes or str
        Text is written as UTF-8.
    secret : bool
        Only the owner may read it (mode 0600); else as the umask says.
    new : bool
        Refuse where something has that name already.

    Raises
    ------
    InputError
        There is such a file already.
    OSError
        It cannot be written; its ``filename`` is the path that was asked for.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe or /dev/stdout: nothing to put in its place
        with path.open("wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
        return
    path = path.resolve()  # a link stays one
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            if not secret:
                os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
            _put(name, path, new)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except FileExistsError:
        raise InputError(f"{path} is there already and is left as it is; choose another place, or remove it") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _put(name: str, path: Path, new: bool) -> None:
    if not new:
        os.replace(name, path)
        return
    os.link(name, path)  # unlike a rename it fails where something is there
    os.unlink(name)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
