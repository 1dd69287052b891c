"""Settings: where lamfs keeps things, who the user is, which instances this machine knows. Any thread.

No state, except for the directories that are known to be writable only by the user.

Small JSON files below the config directory, mode 0600. Each is replaced as a whole (temporary file, fsync, rename), so
that a reader sees the old or the new one. They contain no credentials: at most, a storage names a profile of boto3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import getpass
import hashlib
import json
import os
import re
import secrets
import socket
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from lamfs import permissions, processes, scratch
from lamfs.errors import InvalidArgument, LamfsError, NotSetUp
from lamfs.jsontext import is_number, parse_object
from lamfs.model import BASE62, USER_UID_LEN, StorageConfig, instance_id

_HANDLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_TIMEOUT = 1e9
"""Seconds: the most that poll(2) and socket timeouts accept."""
MAX_JSON = 1 << 20
"""Most bytes of a settings file, unless its reader gives another limit."""


# -- directories ------------------------------------------------------------------------------------------------------

_checked: dict[str, tuple[int, int, int]] = {}
"""Mode, owner and group that directories had when only the user could write to them, by path."""


def config_dir() -> Path:
    """Settings. ``LAMFS_CONFIG_DIR``, else the platform's place. Made with mode 0700."""
    return _directory("LAMFS_CONFIG_DIR", platformdirs.user_config_dir)


def data_dir() -> Path:
    """Registries, journals, spools. ``LAMFS_DATA_DIR``, else the platform's place. Made with mode 0700."""
    return _directory("LAMFS_DATA_DIR", platformdirs.user_data_dir)


def cache_dir() -> Path:
    """The block cache. ``LAMFS_CACHE_DIR``, else the platform's place. Made with mode 0700."""
    return _directory("LAMFS_CACHE_DIR", platformdirs.user_cache_dir)


def _directory(variable: str, default: Callable[..., str]) -> Path:
    """Raises NotSetUp if it cannot be made, or others can write to it. Cheap as long as nothing changes."""
    path = os.path.abspath(os.path.expanduser(os.environ.get(variable) or default("lamfs", appauthor=False)))
    if not os.path.isdir(path):
        make_directory(Path(path))
    status = os.stat(path)
    seen = (status.st_mode, status.st_uid, status.st_gid)
    if _checked.get(path) != seen:
        permissions.check_private(path, status, variable)
        _checked[path] = seen
    return Path(path)


def make_directory(path: Path) -> None:
    """Make a directory that only its owner can enter, and missing parents likewise. Raises NotSetUp."""
    try:
        for missing in reversed([folder for folder in (path, *path.parents) if not folder.is_dir()]):
            missing.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise NotSetUp(
            f"The directory {path} cannot be made ({os.strerror(error.errno or errno.EIO)}); make it yourself, or name"
            " another place with LAMFS_CONFIG_DIR, LAMFS_DATA_DIR or LAMFS_CACHE_DIR.",
            errno=error.errno,
        ) from error


# -- JSON files -------------------------------------------------------------------------------------------------------


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any] | None:
    """The object in a settings file of up to ``limit`` bytes; None if there is no such file. Raises NotSetUp if it is
    damaged."""
    try:
        with path.open("rb") as stream:
            return parse_object(stream.read(limit + 1), limit)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise NotSetUp(f"The settings file {path} cannot be read ({error}); mend or delete it.") from error


def write_json(path: Path, data: dict[str, Any], *, durable: bool = True) -> None:
    """Replace a settings file as a whole, mode 0600. Raises LamfsError.

    ``durable``: sync it before it gets its name. Not needed for a file that is useless after the next boot.
    """
    make_directory(path.parent)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as stream:
                json.dump(data, stream, indent=2, ensure_ascii=False)
                stream.write("\n")
                stream.flush()
                if durable:
                    os.fsync(fd)
            os.rename(temp, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temp.unlink()
            raise
    except OSError as error:
        raise LamfsError(
            f"The settings file {path} cannot be written ({os.strerror(error.errno or errno.EIO)}).", errno=error.errno
        ) from error


# -- the user ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class UserSettings:
    """The user. ``uid``: 8 base62 characters, made from the handle, so it is the same on every machine."""

    handle: str
    email: str | None
    uid: str
    name: str | None = None


def user_uid(handle: str) -> str:
    """uid of a user: 8 base62 characters that depend only on the handle."""
    number = int.from_bytes(hashlib.sha256(f"lamfs user {handle}".encode()).digest(), "big")
    digits = []
    for _ in range(USER_UID_LEN):
        number, digit = divmod(number, len(BASE62))
        digits.append(BASE62[digit])
    return "".join(digits)


def check_handle(handle: str) -> str:
    """Check a user's handle or an instance's name. Raises InvalidArgument."""
    if not _HANDLE.fullmatch(handle):
        raise InvalidArgument(
            f"'{handle}' is no name for a user or an instance; use up to 64 letters, digits, '.', '_' and '-',"
            " beginning with a letter or digit."
        )
    return handle


def make_user(handle: str, email: str | None = None, name: str | None = None) -> UserSettings:
    """A user with that handle. Without an e-mail address: ``handle@host``, like git. Raises InvalidArgument."""
    check_handle(handle)
    return UserSettings(handle, email or f"{handle}@{socket.gethostname()}", user_uid(handle), name)


def load_user() -> UserSettings | None:
    """The user who is logged in; None: nobody. Raises NotSetUp if the file is damaged."""
    path = config_dir() / "user.json"
    return _user(path, read_json(path))


def known_user(handle: str) -> UserSettings | None:
    """The user who logged in here earlier with that handle."""
    path = config_dir() / "users" / f"{check_handle(handle)}.json"
    return _user(path, read_json(path))


def _user(path: Path, data: dict[str, Any] | None) -> UserSettings | None:
    if data is None:
        return None
    try:
        user = UserSettings(data["handle"], data.get("email"), data["uid"], data.get("name"))
    except KeyError as error:
        raise NotSetUp(f"The settings file {path} lacks {error}; run 'lamfs login' again.") from None
    optional = (user.email, user.name)
    if not (
        isinstance(user.handle, str)
        and isinstance(user.uid, str)
        and all(text is None or isinstance(text, str) for text in optional)
    ):
        raise NotSetUp(f"The settings file {path} is damaged: not all is text; run 'lamfs login' again.")
    return user


def save_user(user: UserSettings) -> None:
    """Log a user in."""
    write_json(config_dir() / "users" / f"{user.handle}.json", dataclasses.asdict(user))
    write_json(config_dir() / "user.json", dataclasses.asdict(user))


def current_user() -> UserSettings:
    """The user who is logged in, else the user of the operating system."""
    return load_user() or make_user(system_handle())


def system_handle() -> str:
    """The operating system's name of the user, as a handle."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in containers
        name = f"uid{os.getuid()}"
    handle = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:64]
    return handle or f"uid{os.getuid()}"


# -- instances --------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class InstanceSettings:
    """One instance as this machine knows it: its slug ``owner/name``, and how to reach its storage.

    ``stored_slug``: the slug in its registry, if this machine already knows another instance by that one.
    """

    slug: str
    storage: StorageConfig
    stored_slug: str | None = None

    @property
    def registry_slug(self) -> str:
        """The slug in its registry."""
        return self.stored_slug or self.slug

    @property
    def id(self) -> uuid.UUID:
        """``uuid5(NAMESPACE_URL, registry_slug)``: the same on every machine."""
        return instance_id(self.registry_slug)

    @property
    def owner(self) -> str:
        """The part before the slash."""
        return self.slug.partition("/")[0]

    @property
    def name(self) -> str:
        """The part after the slash."""
        return self.slug.partition("/")[2]

    @property
    def directory(self) -> Path:
        """The directory for the instance's files on this machine."""
        return data_dir() / instance_id(self.slug).hex

    @property
    def registry_path(self) -> Path:
        """The registry's working copy."""
        return self.directory / "registry.lndb"

    def check_working_copy(self) -> None:
        """Raise NotSetUp if the registry's working copy is missing."""
        if not self.registry_path.exists():
            raise NotSetUp(
                f"The working copy of instance '{self.slug}' is not on this machine ({self.registry_path}); run"
                f" 'lamfs connect {self.slug}'."
            )

    @property
    def snapshot_key(self) -> str:
        """Object key of the registry's copy in storage."""
        return f"{self.id.hex}.lndb"

    @property
    def spool_place(self) -> tuple[str, tuple[str, ...]]:
        """Where bytes wait for storage: an existing folder, and the folders below it, which lamfs makes (spool.py).

        If storage is a folder, the spool is on its file system, so that storing is a rename. Each machine that uses the
        folder has its own spool there (ops/spools.py). Raises NotSetUp like machine_token.
        """
        if self.storage.root.startswith("/"):
            return self.storage.root, (".lamindb", "_spool", f"{self.id.hex}.{spool_mark()}")
        return str(self.directory), ("spool",)

    @property
    def mounts_dir(self) -> Path:
        """Records and control sockets of live mounts."""
        return self.directory / "mounts"


def parse_slug(text: str) -> str:
    """``owner/name``, or ``name`` of the current user's instance. Raises InvalidArgument."""
    owner, slash, name = text.rpartition("/")
    if not slash:
        owner = current_user().handle
    return f"{check_handle(owner)}/{check_handle(name)}"


def _instance_path(slug: str) -> Path:
    return config_dir() / "instances" / f"{instance_id(slug).hex}.json"


def load_instance(slug: str | None = None) -> InstanceSettings:
    """Settings of an instance; None: the current one. A bare name also finds another owner's instance, if only one
    instance has that name.

    Raises NotSetUp, which tells what to run.
    """
    if slug is None:
        slug = current_slug()
        if slug is None:
            known = [settings.slug for settings in list_instances()]
            if known:
                raise NotSetUp(
                    f"No instance is connected; this machine knows {', '.join(known)}: 'lamfs connect {known[0]}'"
                    f" (ln.setup.connect) makes one the current one, LAMFS_INSTANCE={known[0]} or --instance names one."
                )
            raise NotSetUp(
                "No instance is connected; run 'lamfs init --storage FOLDER_OR_S3_URL' (ln.setup.init), or"
                " 'lamfs connect'."
            )
    elif "/" not in slug:
        own = parse_slug(slug)
        named = [known.slug for known in list_instances() if known.name == slug]
        slug = own if own in named or len(named) != 1 else named[0]
    slug = parse_slug(slug)
    path = _instance_path(slug)
    data = read_json(path)
    if data is None:
        raise NotSetUp(
            f"There is no instance '{slug}' on this machine; 'lamfs instances' lists them, 'lamfs connect' adds one."
        )
    return _instance(path, data)


def _instance(path: Path, data: dict[str, Any]) -> InstanceSettings:
    fields = {field.name for field in dataclasses.fields(StorageConfig)}
    try:
        # Fields of a newer lamfs are left out: an older one can still use the fields that it knows.
        storage = StorageConfig(**{name: value for name, value in data["storage"].items() if name in fields})
        _check_types(storage)
        stored = data.get("stored_slug")
        return InstanceSettings(parse_slug(data["slug"]), storage, None if stored is None else parse_slug(stored))
    except (KeyError, TypeError, AttributeError, InvalidArgument) as error:
        raise NotSetUp(f"The settings file {path} is damaged ({error!r}); run 'lamfs connect' again.") from error


def _check_types(storage: StorageConfig) -> None:
    """Raise TypeError if a setting of a storage has a wrong type."""
    optional = (storage.endpoint_url, storage.region, storage.profile)
    if not (
        isinstance(storage.root, str)
        and all(text is None or isinstance(text, str) for text in optional)
        and isinstance(storage.path_style, bool)
        and is_number(storage.timeout, 0, MAX_TIMEOUT)
    ):
        raise TypeError("not the settings of a storage")


def save_instance(settings: InstanceSettings) -> None:
    """Make an instance known to this machine, or change how its storage is reached."""
    write_json(_instance_path(settings.slug), dataclasses.asdict(settings))


def remove_instance(slug: str) -> None:
    """Forget an instance, also as the current one. No error if it is not known."""
    with contextlib.suppress(FileNotFoundError):
        _instance_path(slug).unlink()
    if current_slug() == slug:
        set_current(None)


def list_instances() -> list[InstanceSettings]:
    """All instances that this machine knows, by slug. Raises NotSetUp if a file is damaged."""
    found = []
    for path in (config_dir() / "instances").glob("*.json"):
        data = None if path.name.startswith(".") else read_json(path)
        if data is not None:
            found.append(_instance(path, data))
    return sorted(found, key=lambda known: known.slug)


def current_slug() -> str | None:
    """The instance for commands that name none: ``LAMFS_INSTANCE``, else the one set last."""
    named = os.environ.get("LAMFS_INSTANCE")
    if named:
        return parse_slug(named)
    data = read_json(config_dir() / "current.json")
    return parse_slug(str(data["slug"])) if data and data.get("slug") else None


def set_current(slug: str | None) -> None:
    """Choose the current instance; None: no instance."""
    if slug is None:
        with contextlib.suppress(FileNotFoundError):
            (config_dir() / "current.json").unlink()
    else:
        write_json(config_dir() / "current.json", {"slug": slug})
        (config_dir() / _REFUSED).unlink(missing_ok=True)


_REFUSED = "refused.json"


def note_refused(command: str) -> None:
    """Record the command that wanted a locked instance, until an instance is chosen."""
    write_json(config_dir() / _REFUSED, {"command": command})


def refused() -> str | None:
    """The command of ``note_refused``. None: no instance was refused since one was chosen. Raises NotSetUp."""
    data = read_json(config_dir() / _REFUSED)
    return str(data["command"]) if data and data.get("command") else None


def scratch_names() -> tuple[str, ...]:
    """Patterns of names that never become artifacts (scratch.py). Raises NotSetUp if the settings are damaged."""
    path = config_dir() / "settings.json"
    found = (read_json(path) or {}).get("scratch_names")
    if found is None:
        return scratch.DEFAULT
    if not isinstance(found, list) or not all(isinstance(pattern, str) for pattern in found):
        raise NotSetUp(f"'scratch_names' in {path} is no list of patterns; mend or delete it.")
    return tuple(found)


def set_scratch_names(patterns: Iterable[str] | None) -> None:
    """Choose the patterns for future mounts; None: the default ones. Raises InvalidArgument."""
    path = config_dir() / "settings.json"
    data = read_json(path) or {}
    data.pop("scratch_names", None)
    if patterns is not None:
        data["scratch_names"] = list(dict.fromkeys(scratch.check(pattern) for pattern in patterns))
    write_json(path, data)


def machine_token() -> str:
    """A random name of this data directory. For the lease of an instance, one data directory is one machine."""
    path = data_dir() / "machine.json"
    data = read_json(path)
    if data is None:
        temp = data_dir() / f".machine.{secrets.token_hex(6)}"
        write_json(temp, {"token": secrets.token_hex(16)})
        # Two processes may be here at once: link(2) lets one of them win.
        with contextlib.suppress(FileExistsError):
            os.link(temp, path)
        temp.unlink()
        data = read_json(path)
    token = None if data is None else data.get("token")
    if not isinstance(token, str) or not token:
        raise NotSetUp(f"The file {path} has no token of this machine; delete it.")
    return token


_tokens: dict[Path, str] = {}


def machine_mark() -> str:
    """The beginning of machine_token(), for names of temporary files. Zeros if there is no token."""
    try:
        path = data_dir()
        if path not in _tokens:
            _tokens[path] = machine_token()[:12].lower().replace(" ", "-")
        return _tokens[path]
    except (LamfsError, OSError):
        return "0" * 12


def spool_mark() -> str:
    """12 hexadecimal digits that distinguish this data directory's spools from others in a shared storage folder.

    They are made from machine_token(), which also identifies the machine to the lease, and from the directory's inode
    number: a copied home folder has the same token as its original, which may still be in use. They contain neither the
    host name nor anything from the instance, so they stay when the machine is renamed, or the instance is connected
    again. Raises NotSetUp.
    """
    name = f"{machine_token()}:{os.stat(data_dir()).st_ino}"
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:12]


def temporary_name() -> str:
    """A new name for a temporary file, which tells whose it is."""
    return processes.mark(machine_mark())


def temporary_folder() -> Path:
    """The folder of this machine's temporary files that do not belong to an instance. Made if missing.

    ops/temporaries.py removes what dead processes leave there. Raises LamfsError.
    """
    folder = data_dir() / "tmp"
    make_directory(folder)
    return folder
