"""Environment variables that look like secrets are taken from the process that calls rules, and from its programs.

A rule reads text that a model wrote, and may be made to print or send what it can reach. This guards against
accidents: a rule of the same user can still read the training process's own /proc/PID/environ, files of tokens such as
~/.netrc, and what a module kept when it was imported.
"""

import contextlib
import ctypes
import os
import posix
import re

# Parts of names: HF_TOKEN, API_TOKENS, WANDB_API_KEY, PGPASSWORD, MYSQL_PWD, AWS_*; but not MAX_TOKENS,
# TOKENIZERS_PARALLELISM or PWD.
_NAMES = re.compile(
    r"TOKEN(?![A-Z])|(API|ACCESS|AUTH|BEARER|REFRESH)_?TOKENS|SECRET|PASSW|PASSPHRASE|PASSFILE|CREDENTIAL|APIKEY|^AWS_|_PWD$|(?<![A-Z])(KEYS?|PASS|PAT|AUTH|COOKIE)(?![A-Z])",
    re.IGNORECASE,
)
_NO_SECRETS = frozenset(("OLDPWD",))
# An address with a password in it.
_VALUES = re.compile(r"://[^/\s:@]*:[^/\s@]+@")


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable looks like a token, key or password."""
    return name not in _NO_SECRETS and bool(_NAMES.search(name) or _VALUES.search(value))


def forget_secrets() -> None:
    """Remove what looks like a secret from this process's environment, and from its /proc/self/environ."""
    names = [name for name, value in os.environ.items() if is_secret(name, value)]
    for name in names:
        del os.environ[name]
        posix.environ.pop(os.fsencode(name), None)  # what os.environ was made from
    with contextlib.suppress(OSError, IndexError, ValueError):  # no /proc; the variables are gone all the same
        _erase(names)


def _erase(names: list[str]) -> None:
    """Overwrite variables where Linux shows them: in the memory that this process was started with."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[47]), int(fields[48])  # env_start and env_end, fields 50 and 51 of proc(5)
    if not 0 < start < end:  # hidden
        return
    place = start
    for entry in ctypes.string_at(start, end - start).split(b"\0"):
        if os.fsdecode(entry.partition(b"=")[0]) in names:
            ctypes.memset(place, 0, len(entry))
        place += len(entry) + 1
