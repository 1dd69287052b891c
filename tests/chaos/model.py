"""What was acknowledged. Pure: knows names and versions, touches nothing.

In exact times the whole tree is predicted: ``Model.tree``. What may have happened or not, because something was killed
in the middle, is a Doubt until somebody has looked. After damage names may be others; then the tree that is found is
checked as a whole (oracle.py), and predicted from there on (``Model.rebase``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.chaos.content import Piece, Version

LARGE = 100 << 20


@dataclass(eq=False)
class File:
    """A content that was acknowledged under a name.

    ``names``: base names it ever had, by which it may be named when it is lost. ``stored``: a promise was given that
    storage has it. ``machine``: where it was written.
    """

    version: Version
    names: frozenset[str]
    machine: str
    stored: bool = False

    def called(self, path: str) -> File:
        """The same content under another name."""
        return File(self.version, self.names | {path.rpartition("/")[2]}, self.machine, self.stored)

    def with_version(self, version: Version, machine: str, *, stored: bool = False) -> File:
        """The same file with another content."""
        return File(version, self.names, machine, stored)


Tree = dict[str, File]


@dataclass
class Stage:
    """How things are after a promise: paths that changed (None: not there), and what went to the trash or left it."""

    paths: Mapping[str, File | None]
    trashed: tuple[File, ...] = ()
    restored: tuple[File, ...] = ()

    def with_stored_only(self, digests: set[str]) -> Stage:
        """The same, with only these contents known to be in storage."""
        paths = {
            path: file and File(file.version, file.names, file.machine, file.version.digest in digests)
            for path, file in self.paths.items()
        }
        return Stage(paths, self.trashed, self.restored)

    def matches(self, seen: Mapping[str, str | None]) -> bool:
        """Whether paths that were looked at hold what they should. ``seen``: digests, None for what is not there."""
        return all((None if file is None else file.version.digest) == seen[path] for path, file in self.paths.items())


@dataclass
class Doubt:
    """Something was killed in the middle: one of ``stages`` is true. ``torn``: paths whose content may be,
    page by page, of either of some versions."""

    what: str
    stages: list[Stage]
    torn: dict[str, list[Version]] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """What to look at."""
        return sorted({path for stage in self.stages for path in stage.paths})


@dataclass
class Plan:
    """An operation: what to do, and the stages it goes through. ``stages[0]`` is how things are; each promise leads to
    the next one.

    One of ``step`` (a worker's) and ``words`` (of a command) is given.
    """

    what: str
    stages: list[Stage]
    step: dict[str, object] | None = None
    words: tuple[str, ...] | None = None
    torn: dict[str, list[Version]] = field(default_factory=dict)

    def doubt(self, promises: int) -> Doubt:
        """What may be after so many promises, when nobody heard how it went on. That it was stored, nobody has said."""
        sure, *rest = self.stages[promises:]
        stored = {file.version.digest for file in sure.paths.values() if file is not None and file.stored}
        if self.step is not None:
            rest = [stage.with_stored_only(stored) for stage in rest]
        return Doubt(self.what, [sure, *rest], {} if promises else self.torn)


@dataclass
class Excuse:
    """What damage may cost of a file, if the file is named: these pieces."""

    file: File
    why: str
    pieces: tuple[Piece, ...]
    words: frozenset[str] = frozenset()
    """What else names it, beside the file's names: such as the uid in its object's key."""
    silent: bool = False
    """It need not be named: nobody who is left can know of it."""


class Model:
    """What has to be there."""

    def __init__(self) -> None:
        self.tree: Tree = {}
        self.folders: list[str] = []
        self.trash: list[File] = []
        self.versions: dict[str, Version] = {}
        """Every content that anybody ever tried to write, by digest."""
        self.paths: set[str] = set()
        """Every path that was ever predicted."""
        self.changed_by: dict[str, str] = {}
        """Who changed a path last: a mount, or a machine's command."""
        self.broken: set[str] = set()
        """Paths that cannot be read since damage; that is known and named."""
        self.blemished = False
        """Storage was damaged, or the registry is older than it, and fsck has to say so from then on."""
        self.counts: dict[str, int] = {}

    def know(self, version: Version) -> Version:
        """Remember a content."""
        return self.versions.setdefault(version.digest, version)

    def count(self, what: str, by: int = 1) -> None:
        """For the report."""
        self.counts[what] = self.counts.get(what, 0) + by

    def apply(self, stage: Stage, by: str) -> None:
        """This is how things are now."""
        for path, file in stage.paths.items():
            self.changed_by[path] = by
            if file is None:
                self.tree.pop(path, None)
            else:
                self.tree[path] = file
                self.paths.add(path)
        self.trash = [file for file in self.trash if file not in stage.restored]
        self.trash += [file for file in stage.trashed if file.stored and not file.version.opaque]

    def stored(self, machine: str) -> None:
        """Everything that was written on a machine is in storage."""
        for file in self.tree.values():
            if file.machine == machine:
                file.stored = True

    def claims(self) -> list[File]:
        """Everything that has to be somewhere."""
        return [*self.tree.values(), *self.trash]

    def touching(self, pieces: Iterable[Piece]) -> list[File]:
        """What has bytes among these."""
        wanted = [piece for piece in pieces if piece.stream]
        return [
            file
            for file in self.claims()
            if any(
                one.stream == two.stream and one.start < two.end and two.start < one.end
                for one in file.version.pieces
                for two in wanted
            )
        ]

    def large(self) -> int:
        """How many large files there are."""
        return sum(1 for file in self.tree.values() if file.version.size >= LARGE)

    def rebase(self, tree: Mapping[str, Version], trash: Iterable[Version], machine: str) -> None:
        """The tree that was found is what is predicted from now on."""
        names: dict[str, frozenset[str]] = {}
        for file in self.claims():
            names[file.version.digest] = names.get(file.version.digest, frozenset()) | file.names
        for version in [*tree.values(), *trash]:
            self.know(version)
        self.tree = {
            path: File(version, names.get(version.digest, frozenset()) | {path.rpartition("/")[2]}, machine, True)
            for path, version in tree.items()
        }
        self.paths |= tree.keys()
        self.trash = [
            File(version, names.get(version.digest, frozenset()), machine, True)
            for version in trash
            if version.digest in names and not version.opaque
        ]
        self.folders = [folder for folder in self.folders if any(path.startswith(f"{folder}/") for path in tree)]
        self.changed_by = {}
