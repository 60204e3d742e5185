"""Output that appears whole: written beside its place under another name, and renamed."""

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nec_ray.errors import InputError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def check_free(out: Path) -> None:
    """Refuse a place that is taken, before anything is fetched.

    Raises:
        InputError: something is there, or the folder around it is not, or it is a URL.
    """
    scheme = out.parts[0] if len(out.parts) > 1 else ""
    if _SCHEME.fullmatch(scheme) and not Path(scheme).exists():  # a path has one slash left of a URL's two
        url = str(out).replace(":/", "://", 1)  # as it was given, so that a password in it is known as one
        raise InputError(f"{url}: exports are written to a local folder; give a path as --out, then upload it")
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: already there; give another --out or remove it")
    if not out.parent.is_dir():
        raise InputError(f"{out}: the folder {out.parent} is not there; make it first")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Where to write what is to stand at `out`; it is removed again where writing ends early.

    Raises:
        InputError: the disk refuses, or somebody else took the place meanwhile.
    """
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        check_free(out)
        temporary.rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); give another --out") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
