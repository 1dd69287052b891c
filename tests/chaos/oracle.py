"""Looking at a whole instance, and saying whether everything that was acknowledged is there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from tests.chaos.content import (
    CHUNK,
    Explanation,
    Piece,
    Ranges,
    Version,
    explain,
    explanation_from_json,
)
from tests.chaos.model import Doubt, Excuse, File, Model, Stage
from tests.chaos.world import SLUG, Machine, Mount, Violation, wait_until

SEEN_SECONDS = 30.0
"""How long a mount may take to show what was done elsewhere."""
LOST = "lost+found"


@dataclass
class Found:
    """One file as it was found. ``known``: it is, as a whole, something that was written."""

    version: Version
    pieces: list[Piece]
    garbage: list[tuple[int, int]] = field(default_factory=list)
    known: bool = True


@dataclass
class Scan:
    """A whole instance as it was found. ``unreadable``: errors by path."""

    tree: dict[str, Found]
    unreadable: dict[str, str]
    trash: list[Found]

    def everything(self) -> list[Found]:
        """All that has a name, or is in the trash."""
        return [*self.tree.values(), *self.trash]


def scan(machine: Machine, mount: Mount, model: Model) -> Scan:
    """Read every file of a mount, and what is in the trash."""
    files = mount.do({"do": "scan", "drop": True})["files"]
    tree: dict[str, Found] = {}
    unreadable: dict[str, str] = {}
    for path, look in files.items():
        if isinstance(look, str) or look is None:
            unreadable[path] = str(look)
            continue
        version = model.versions.get(look[1])
        if version is not None:
            tree[path] = Found(version, list(version.pieces))
        else:
            step = {"do": "explain", "path": path, "versions": [each.listed() for each in model.versions.values()]}
            tree[path] = _found(explanation_from_json(mount.do(step)), look[1])
    return Scan(tree, unreadable, _trash(machine, model))


def _found(found: Explanation, digest: str) -> Found:
    return Found(found.version(digest), found.pieces, found.garbage, known=False)


def _trash(machine: Machine, model: Model) -> list[Found]:
    storage = machine.world.storage
    found = []
    records = machine.json("ls", "--trash", "--instance", SLUG)
    if records is None:
        raise Violation(
            "refused", f"'lamfs ls --trash' on {machine.name} lists nothing, though the instance is mounted"
        )
    for record in records:
        key = record["storage_path"].removeprefix(f"{storage.root}/")
        digest = storage.digest(key)
        if digest is None:
            continue  # what is missing is found out below
        version = model.versions.get(digest)
        if version is not None:
            found.append(Found(version, list(version.pieces)))
        else:
            data = storage.get(key)
            chunks = (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))
            found.append(_found(explain(chunks, list(model.versions.values())), digest))
    return found


# -- exact ------------------------------------------------------------------------------------------------------------


def check_exact(machine: Machine, mount: Mount, model: Model) -> None:
    """The tree is just what is predicted, and the trash holds what was thrown away. Raises Violation."""
    found: Scan | None = None

    def is_right() -> bool:
        nonlocal found
        found = scan(machine, mount, model)
        return not _differences(found, model)

    if not wait_until(is_right, SEEN_SECONDS, every=1.0):
        assert found is not None
        differences = _differences(found, model)
        kind = "lost" if any("holds" in text or "missing" in text for text in differences) else "wrong"
        raise Violation(kind, f"in {mount}: " + "; ".join(differences[:10]))
    assert found is not None
    ranges = _ranges(found.trash)
    digests = {each.version.digest for each in found.trash}
    for file in model.trash:
        if file.version.digest not in digests and (file.version.opaque or ranges.missing(file.version)):
            raise Violation("lost", f"{sorted(file.names)} ({file.version}) is not in the trash of {machine.name}")


def _differences(found: Scan, model: Model) -> list[str]:
    texts = [f"'{path}' cannot be read ({error})" for path, error in found.unreadable.items() if path in model.tree]
    for path, file in model.tree.items():
        each = found.tree.get(path)
        if each is None and path not in found.unreadable:
            at = [other for other, one in found.tree.items() if one.version.digest == file.version.digest]
            texts.append(f"'{path}' ({file.version}) is missing" + (f", its bytes are at {at}" if at else ""))
        elif each is not None and each.version.digest != file.version.digest:
            texts.append(f"'{path}' holds {describe(each)}, not {file.version}")
    extra = (found.tree.keys() | found.unreadable.keys()) - model.tree.keys() - model.broken
    texts += [f"'{path}' should not be there" for path in sorted(extra)]
    return texts


def describe(found: Found) -> str:
    """What a file's bytes are, for people."""
    if found.known:
        return f"another version, {found.version}"
    parts = ", ".join(f"{start}-{end} of stream {stream:x}" for start, end, stream in found.pieces[:6])
    return f"a mixture ({parts or 'nothing known'}; garbage at {found.garbage[:6]})"


# -- doubts -----------------------------------------------------------------------------------------------------------


def resolve(model: Model, mount: Mount, doubts: Iterable[Doubt]) -> None:
    """Look how it went with what was killed in the middle. Raises Violation when it is neither old nor new."""
    for doubt in doubts:
        if not wait_until(partial(_settle, model, mount, doubt), SEEN_SECONDS, every=0.5):
            seen = _look(mount, doubt.paths)
            texts = [
                f"'{path}' holds {digest and digest[:12]}, allowed:"
                f" {[stage.paths.get(path) and stage.paths[path].version for stage in doubt.stages]}"  # type: ignore[union-attr]
                for path, digest in seen.items()
            ]
            raise Violation("mixture", f"{doubt.what} was broken off, and {mount} shows neither: " + "; ".join(texts))


def _look(mount: Mount, paths: list[str]) -> dict[str, str | None]:
    files = mount.do({"do": "digest", "paths": paths})["files"]
    return {path: look[1] if isinstance(look, list) else look for path, look in files.items()}


def _settle(model: Model, mount: Mount, doubt: Doubt) -> bool:
    seen = _look(mount, doubt.paths)
    for stage in doubt.stages:
        if stage.matches(seen):
            model.apply(stage, str(mount))
            return True
    return bool(doubt.torn) and _settle_torn(model, mount, doubt, seen)


def _settle_torn(model: Model, mount: Mount, doubt: Doubt, seen: dict[str, str | None]) -> bool:
    """A file that was written in place: each page is of one of the versions. Other paths are as in the first stage."""
    rest = {path: digest for path, digest in seen.items() if path not in doubt.torn}
    first = doubt.stages[0]
    if any((file := first.paths.get(path)) is not None and file.version.digest != rest[path] for path in rest):
        return False
    for path, versions in doubt.torn.items():
        digest = seen[path]
        if digest is None:
            if first.paths.get(path) is not None:
                return False
            model.apply(Stage({path: None}), str(mount))
            continue
        if len(digest) < 64:  # the name of an error
            return False
        found = explanation_from_json(
            mount.do({"do": "explain", "path": path, "versions": [version.listed() for version in versions]})
        )
        if found.garbage:
            return False
        version = model.know(found.version(digest))
        before = first.paths.get(path)
        names = before.names if before is not None else frozenset({path.rpartition("/")[2]})
        model.apply(Stage({path: File(version, names, mount.machine.name)}), str(mount))
    return True


# -- after damage -----------------------------------------------------------------------------------------------------


def check_somewhere(
    machine: Machine,
    mount: Mount,
    model: Model,
    claims: Iterable[File],
    excuses: Iterable[Excuse] = (),
    mixed: frozenset[str] = frozenset(),
) -> None:
    """Every byte of ``claims`` is somewhere in the tree or in the trash, but for what is excused; that is named.
    Nothing else is in any file, and versions are mixed only in the paths ``mixed``. Predicts what was found from now
    on. Raises Violation."""
    log = machine.world.log
    found = scan(machine, mount, model)
    ranges = _ranges(found.everything())
    digests = {each.version.digest for each in found.everything()}
    forgiven: dict[str, list[Excuse]] = {}
    for excuse in excuses:
        forgiven.setdefault(excuse.file.version.digest, []).append(excuse)
    lost = []
    names: dict[str, frozenset[str]] = {}
    for file in claims:
        names[file.version.digest] = names.get(file.version.digest, frozenset()) | file.names
        if file.version.digest in digests:
            continue
        missing = [] if file.version.opaque else ranges.missing(file.version)
        if not missing and not file.version.opaque:
            continue
        excused = forgiven.get(file.version.digest, [])
        spared = Ranges()
        for excuse in excused:
            spared.add(excuse.pieces)
        left = spared.missing(Version(missing))
        what = f"{sorted(file.names)} ({file.version}, {'stored' if file.stored else 'closed'} on {file.machine})"
        if left or not excused:
            why = f" ({'; '.join(excuse.why for excuse in excused)} costs less)" if excused else ""
            at = ", ".join(f"{start}-{end}" for start, end, _ in left[:5])
            lost.append(f"{what}: bytes {at or 'all'} are nowhere{why}")
        elif not any(excuse.silent for excuse in excused) and not log.named(
            [*file.names, *(word for excuse in excused for word in excuse.words)]
        ):
            raise Violation("unnamed", f"{what} is lost ({excused[0].why}), and nothing says so")
    log.write("scan", machine=machine.name, files=len(found.tree), unreadable=found.unreadable, lost=lost)
    for path, each in found.tree.items():
        known = names.get(each.version.digest)
        if not path.startswith(f"{LOST}/") or known is None or path in model.paths or path.rpartition("/")[2] in known:
            continue  # somebody knows it by that name, or knew it
        if not log.named([path, *known]):
            raise Violation("unnamed", f"on {machine.name} '{path}' ({each.version}) is there, and nothing says so")
    if lost:
        raise Violation("lost", f"on {machine.name}, {len(lost)} of {len(list(model.claims()))}: " + "; ".join(lost))
    _check_bytes(machine, found, mixed, model.paths)
    # What an older registry knows, and was deleted for good since, may be in a cache still.
    cached = {
        path
        for path in found.tree.keys() & _gone(machine)
        if path.rpartition("/")[2] not in names.get(found.tree[path].version.digest, ())
    }
    tree = {path: each.version for path, each in found.tree.items() if path not in cached}
    model.rebase(tree, [each.version for each in found.trash], machine.name)
    model.broken = {*found.unreadable, *cached}


def _gone(machine: Machine) -> set[str]:
    """Keys of artifacts whose objects are not in storage."""
    storage = machine.world.storage
    there = set(storage.keys())
    records = machine.json("ls", "--instance", SLUG) or []
    paths = {record["key"]: record["storage_path"].removeprefix(f"{storage.root}/") for record in records}
    return {key for key, path in paths.items() if key is not None and path not in there}


def _check_bytes(machine: Machine, found: Scan, mixed: frozenset[str], paths: set[str]) -> None:
    """No file under a name of its own holds a mixture, or what nobody wrote, unless some message says so. ``paths``:
    every one that ever was. A registry that was set back to when one was made knows it as empty."""
    log = machine.world.log
    for path, each in found.tree.items():
        name = path.rpartition("/")[2]
        kept = path.startswith(f"{LOST}/") or "(conflict " in name or path in mixed
        if each.known or (kept and not each.garbage) or (not each.version.size and path in paths):
            continue
        if not log.named([name, path]):
            raise Violation("mixture", f"on {machine.name} '{path}' holds {describe(each)}, and nothing says so")
    for path, error in found.unreadable.items():
        if not log.named([path.rpartition("/")[2], path]):
            raise Violation("unnamed", f"on {machine.name} '{path}' cannot be read ({error}), and nothing says so")


def _ranges(found: Iterable[Found]) -> Ranges:
    ranges = Ranges()
    for each in found:
        ranges.add(each.pieces)
    return ranges
