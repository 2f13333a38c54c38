"""Names of folders that hold what is written below them: found out at the start, not at the first checkpoint."""

import os
import sys
from pathlib import Path

# Bytes below a run's folder, at most: checkpoint-1000000.tmp-0123456789abcdef/policy/model-00001-of-00100.safetensors,
# and what libraries add to a name while they write.
_BELOW = 200
# Of a folder that is written under a temporary name beside it: .tmp-0123456789abcdef
_ADDED = 21
_MAX_NAME = 255  # bytes, of every usual file system


def why_no_name(folder: Path, *, is_replaced: bool = False) -> str | None:
    """What speaks against a folder's name, and what to do; None: nothing.

    Args:
        folder: which exists or not.
        is_replaced: it is written under a longer name first.
    """
    text = str(folder)
    if "\0" in text:
        return "a name cannot hold the character NUL"
    encoding = sys.getfilesystemencoding()
    is_unicode = encoding.lower().replace("-", "") == "utf8"
    if not text.isascii() and not is_unicode:
        remedy = "set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
        return f"Python takes names for {encoding} here, and other libraries for UTF-8: {remedy}"
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        return f"it is not UTF-8, which libraries need that write models ({error.reason})"
    if is_replaced and len(folder.name.encode()) + _ADDED > _MAX_NAME:
        return f"its name has {len(folder.name.encode())} bytes, and while it is written, up to {_ADDED} more"
    size += 0 if folder.is_absolute() else len(os.fsencode(os.getcwd())) + 1
    longest = os.pathconf("/", "PC_PATH_MAX")
    if size + _BELOW > longest:
        return f"its path has {size} bytes, and with the files in it, more than the {longest} that a path may have"
    return None
