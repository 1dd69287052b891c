"""Saves by editors and by programs that edit files, on a local folder and on S3: the artifact stays with the name.

vim and `sed -i` are in test_programs_tools.py; what their system calls alone do is in test_backups.py.
"""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.test_programs_tools import need
from tests.support.mounts import MountedInstance

Edit = Callable[[MountedInstance, Path, str], None]
"""Appends a line to a file, with a program."""


EMACS = """
(setq create-lockfiles t make-backup-files t {settings})
;; Otherwise it makes no backups below /tmp.
(setq backup-enable-predicate (lambda (name) t))
(find-file "{path}")
(goto-char (point-max))
(insert "{line}\\n")
(unless (file-symlink-p "{lock}") (error "not locked"))
(save-buffer)
"""


def emacs(settings: str) -> Edit:
    """emacs with these variables, given as Lisp."""

    def edit(mount: MountedInstance, path: Path, line: str) -> None:
        lock = path.with_name(f".#{path.name}")
        code = EMACS.format(settings=settings, path=path, line=line, lock=lock)
        mount.run([need("emacs"), "-Q", "--batch", "--eval", f"(progn {code})"])

    return edit


IN_A_TERMINAL = """
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execvp(sys.argv[2], sys.argv[2:])
shown, keys = b"", sys.argv[1].encode()
while True:
    try:
        part = os.read(terminal, 4096)
    except OSError:
        part = b""
    if not part:
        break
    shown += part
    if keys and b"^G" in shown:  # The line of help: from now on it reads keys.
        os.write(terminal, keys)
        keys = b""
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
sys.exit(f"it ended with {code}: {shown!r}" if code or keys else 0)
"""


def nano(*options: str) -> Edit:
    """nano, which knows no other input than a terminal."""

    def edit(mount: MountedInstance, path: Path, line: str) -> None:
        command = [need("nano"), "--ignorercfiles", "--saveonexit", *options, "+9999", str(path)]
        keys = f"{line}\x18"
        mount.run([sys.executable, "-c", IN_A_TERMINAL, keys, *command], env={"TERM": "xterm"})

    return edit


def shell(script: str, program: str = "sh") -> Edit:
    """A line of shell, for the file ``$1`` and the line ``$2``."""

    def edit(mount: MountedInstance, path: Path, line: str) -> None:
        need(program)
        mount.run(["sh", "-euc", script, "sh", path, line])

    return edit


FILEINPUT = """
import fileinput, sys
with fileinput.input(sys.argv[1], inplace=True) as lines:
    for line in lines:
        print(line, end="")
with fileinput.input(sys.argv[1], inplace=True, backup=".bak") as lines:
    for line in lines:
        print(line, end="")
with open(sys.argv[1], "a") as file:
    print(sys.argv[2], file=file)
"""


def python_fileinput(mount: MountedInstance, path: Path, line: str) -> None:
    """Python's module for editing in place: it renames the old file aside, and may remove it."""
    mount.run([sys.executable, "-c", FILEINPUT, path, line])


OFFICE = """
import os, sys
path, line = sys.argv[1:]
folder, name = os.path.split(path)
lock, temporary = f"{folder}/.~lock.{name}#", f"{folder}/lu{os.getpid()}x.tmp"
owner = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
os.write(owner, b",user,host,01.01.2026 12:00,file:///home/user/.config/office;")
os.close(owner)
try:
    os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    sys.exit("two have the lock")
except FileExistsError:
    assert open(lock, "rb").read().startswith(b",user,")
old = open(path, "rb").read()
new = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
os.write(new, old + line.encode() + b"\\n")
os.fsync(new)
os.close(new)
os.chmod(temporary, os.stat(path).st_mode & 0o7777)
os.rename(temporary, path)
os.unlink(lock)
"""


def office(mount: MountedInstance, path: Path, line: str) -> None:
    """LibreOffice's calls: a lock file beside the document, a temporary file that is renamed over it."""
    mount.run([sys.executable, "-c", OFFICE, path, line])


GIO = """
import os, sys
path, line = sys.argv[1:]
temporary, backup = f"{os.path.dirname(path)}/.goutputstream-ABC123", f"{path}~"
old = open(path, "rb").read()
new = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
os.fchmod(new, os.stat(path).st_mode & 0o7777)
os.write(new, old + line.encode() + b"\\n")
os.fsync(new)
if os.path.exists(backup):
    os.unlink(backup)
os.link(path, backup)
os.rename(temporary, path)
os.close(new)
"""


def gio(mount: MountedInstance, path: Path, line: str) -> None:
    """The calls of GNOME's programs that keep a backup: it is a second name of the old file. perl's are alike."""
    mount.run([sys.executable, "-c", GIO, path, line])


EDITORS: dict[str, Edit] = {
    "emacs renames": emacs("backup-by-copying nil"),
    "emacs copies": emacs("backup-by-copying t"),
    "emacs numbers": emacs("version-control t kept-old-versions 9"),
    "emacs replaces": emacs("file-precious-flag t make-backup-files nil"),
    "nano": nano("--locking"),
    "nano keeps": nano("--backup"),
    "ed": shell(r'printf "\$a\n%s\n.\nw\nq\n" "$2" | ed -s "$1"', "ed"),
    "perl": shell('LINE=$2 perl -i -pe \'$_ .= "$ENV{LINE}\\n" if eof\' "$1"', "perl"),
    # The backups of this and of "gio" are hard links.
    "perl keeps": shell('LINE=$2 perl -i.bak -pe \'$_ .= "$ENV{LINE}\\n" if eof\' "$1"', "perl"),
    "gio": gio,
    "fileinput": python_fileinput,
    "office": office,
    "mv keeps": shell('{ cat "$1"; echo "$2"; } > "$1.new"; mv -f --backup=simple "$1.new" "$1"'),
    "cp keeps": shell('{ cat "$1"; echo "$2"; } > "$1.new"; cp --backup "$1.new" "$1"; rm "$1.new"'),
    "install keeps": shell('{ cat "$1"; echo "$2"; } > "$1.new"; install -m 640 -b "$1.new" "$1"; rm "$1.new"'),
    "by hand": shell('mv "$1" "$1~"; { cat "$1~"; echo "$2"; } > "$1"; chmod 640 "$1"'),
}


def files(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and mode of each file."""
    return {path.name: (path.read_text(), stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir()}


@pytest.mark.parametrize("name", EDITORS)
def test_an_edited_file_stays_its_artifact(
    each_mount: MountedInstance, each_dir: Path, tmp_path: Path, name: str
) -> None:
    """Same uid and creation, files as on a disk, and nothing else became an artifact but backups."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for folder in (plain, each_dir):
        (folder / "x.txt").write_text("line 0\n")
        (folder / "x.txt").chmod(0o640)
    key = f"{each_dir.name}/x.txt"
    before = each_mount.stored_info(key)
    for turn in range(1, 4):
        for folder in (plain, each_dir):
            EDITORS[name](each_mount, folder / "x.txt", f"line {turn}")
        assert files(each_dir) == files(plain)
        after = each_mount.stored_info(key)
        assert (after["uid"], after["created_at"]) == (before["uid"], before["created_at"])
        assert files(each_dir) == files(plain)
    assert files(plain)["x.txt"][0] == "line 0\nline 1\nline 2\nline 3\n"
    # The trash counts too: a temporary file or a lock that came there would be a stray record.
    with each_mount.registry() as registry:
        keys = {record.key or record.uid for record in registry.artifacts.filter(visibility=None)}
    assert {key.partition("/")[2] for key in keys if key.startswith(f"{each_dir.name}/")} <= set(files(plain))


def test_edited_files_survive_a_remount(each_mount: MountedInstance, each_dir: Path) -> None:
    """One editor per way of saving; then all is read from storage."""
    ways = ("emacs renames", "nano keeps", "perl", "office")
    uids = {}
    for way in ways:
        path = each_dir / f"{way}.txt"
        path.write_text("line 0\n")
        uids[way] = each_mount.stored_info(f"{each_dir.name}/{path.name}")["uid"]
        for turn in range(1, 4):
            EDITORS[way](each_mount, path, f"line {turn}")
    each_mount.sync()
    assert each_mount.fsck() == []
    each_mount.remount(empty_cache=True)
    for way in ways:
        path = each_dir / f"{way}.txt"
        assert path.read_text() == "line 0\nline 1\nline 2\nline 3\n"
        assert each_mount.info(f"{each_dir.name}/{path.name}")["uid"] == uids[way]
    assert (each_dir / "emacs renames.txt~").read_text() == "line 0\nline 1\nline 2\n"
