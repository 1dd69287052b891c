"""``lamfs save``, ``replace``, ``delete``, ``restore``: commands that change artifacts. Main thread only."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from lamfs.cli.common import instance_option, open_instance, title
from lamfs.cli.output import Progress, complain, note, say, shown, size
from lamfs.cli.seam import FAILURE, Command, leave
from lamfs.errors import InvalidArgument, LamfsError, NotFound
from lamfs.keys import check_key
from lamfs.printable import count_of

if TYPE_CHECKING:
    from lamfs.model import ArtifactRecord
    from lamfs.ops.drafts import Draft
    from lamfs.ops.instance import Instance


@click.command(
    cls=Command,
    examples="""
    lamfs save iris.csv --key flowers/iris.csv --description "six flowers"
    lamfs save results/
    """,
)
@click.argument("path", type=click.Path(exists=True))
@click.option("--key", metavar="KEY", help="Where it is to show in the registry; for a directory, below which key.")
@click.option("--description", metavar="TEXT", help="What it is.")
@click.option("--real-key", is_flag=True, help="The key is to be the object's key in storage too.")
@click.option("--follow-links", is_flag=True, help="In a directory: save what links lead to, too.")
@instance_option
def save(
    path: str, key: str | None, description: str | None, real_key: bool, follow_links: bool, instance: str | None
) -> None:
    """Save a file or a directory.

    Prints uid and key. Without --key it shows at .lamindb/UID.SUFFIX; a KEY that ends with '/' is a directory, into
    which the file goes by its name. A directory becomes one artifact per regular file in it, below the directory's
    name. Links, devices and the like are left out, and said so; what cannot be read is said, and the exit code is 1.
    """
    if real_key and key is None and not os.path.isdir(path):
        raise InvalidArgument("--real-key needs a key; give one with --key.")
    from lamfs.ops import artifacts, folders

    with open_instance(instance, [path] if key is None else []) as opened:
        if not os.path.isdir(path):
            with Progress(path, os.stat(path).st_size) as progress:
                record = artifacts.save(
                    opened, path, key=key, description=description, virtual=not real_key, progress=progress.add,
                    tell=tell_save,
                )  # fmt: skip
            say(f"{record.uid}  {title(record)}")
            return
        base = os.path.basename(os.path.realpath(path)) if key is None else check_key(key.rstrip("/") or key)
        saved = failed = 0
        problems: list[LamfsError] = []
        for file, relative in folders.files_below(
            path, follow_links=follow_links, left_out=leave_out, failed=problems.append
        ):
            try:
                record = artifacts.save(
                    opened,
                    file,
                    key=f"{base}/{relative}",
                    description=description,
                    virtual=not real_key,
                    tell=tell_save,
                )
            except LamfsError as error:
                complain(f"{shown(str(file))}: {error}")
                failed += 1
            else:
                say(f"{record.uid}  {title(record)}")
                saved += 1
        for problem in problems:
            complain(shown(str(problem)))
        if failed:
            complain(f"{count_of(failed, 'file')} could not be saved, {saved} could.")
        if failed or problems:
            leave(FAILURE)


def tell_save(draft: Draft) -> None:
    """Say that an artifact has the bytes already, or that it gets them as its new content."""
    before = draft.replaces
    if before is None:
        return
    if draft.pending:
        note(f"'{title(before)}' is there already: its content is replaced (artifact {before.uid}).")
        return
    text = f"'{title(before)}' has these bytes already (artifact {before.uid})"
    if draft.record.description == before.description:
        note(f"{text}: nothing is changed.")
    else:
        note(f"{text}: only its description is changed.")


def tell_replaced(draft: Draft) -> None:
    """Say that nothing was replaced, or that the key is another one now."""
    if not draft.pending:
        tell_save(draft)
    elif draft.replaces is not None and draft.record.key != draft.replaces.key:
        note(
            f"The suffix follows the new file: its key is now '{title(draft.record)}', and not"
            f" '{title(draft.replaces)}'."
        )


def leave_out(path: str, why: str) -> None:
    """Say that something in a directory is not saved."""
    note(f"left out, {why}: {shown(path)}")


@click.command(cls=Command, examples="lamfs replace flowers/iris.csv new_iris.csv")
@click.argument("artifact")
@click.argument("path", type=click.Path(exists=True, dir_okay=False))
@instance_option
def replace(artifact: str, path: str, instance: str | None) -> None:
    """Replace the content of an artifact.

    ARTIFACT gets the content of the file PATH; its uid, description and provenance stay. When the suffix changes, the
    key changes with it, which is said. ARTIFACT is a key, a uid or a path in a mount.
    """
    from lamfs.ops import artifacts

    with open_instance(instance, [artifact]) as opened:
        uid = artifacts.find(opened, artifact).uid
        drafts: list[Draft] = []
        with Progress(path, os.stat(path).st_size) as progress:
            record = artifacts.replace(opened, uid, path, progress=progress.add, tell=drafts.append)
        for draft in drafts:
            tell_replaced(draft)
        say(f"{record.uid}  {title(record)}")


@click.command(
    cls=Command,
    examples="""
    lamfs delete flowers/iris.csv
    lamfs delete --permanent --yes flowers/iris.csv
    """,
)
@click.argument("names", metavar="ARTIFACT…", nargs=-1, required=True)
@click.option("--permanent", is_flag=True, help="Delete the record and the object for good; no trash.")
@click.option("--keep-storage", is_flag=True, help="With --permanent: leave the object in storage.")
@click.option("--yes", "-y", is_flag=True, help="With --permanent: do not ask.")
@instance_option
def delete(names: tuple[str, ...], permanent: bool, keep_storage: bool, yes: bool, instance: str | None) -> None:
    """Move artifacts to the trash, or delete them.

    'lamfs restore' brings them back from the trash. ARTIFACT is a key, a uid or a path in a mount; with --permanent
    also of one that is in the trash.
    """
    if keep_storage and not permanent:
        raise InvalidArgument("--keep-storage needs --permanent; the trash keeps the object anyway.")
    from lamfs.ops import artifacts

    with open_instance(instance, names) as opened:
        records = [artifacts.find(opened, name, trash=permanent) for name in names]
        if permanent and not yes:
            confirm(records)
        for record in records:
            if permanent:
                artifacts.purge(opened, record, storage=not keep_storage)
                say(f"deleted for good: {record.uid}  {title(record)}")
            else:
                artifacts.trash(opened, record)
                say(f"moved to the trash: {record.uid}  {title(record)}")


def confirm(records: list[ArtifactRecord]) -> None:
    """Ask before deleting for good. Raises InvalidArgument where nobody can be asked."""
    if not sys.stdin.isatty():
        raise InvalidArgument("--permanent deletes for good; without a terminal to ask at, add --yes.")
    for record in records:
        note(f"{record.uid}  {title(record)}  {size(record.size)}")
    if not click.confirm(f"Delete {count_of(len(records), 'artifact')} for good?", err=True):
        complain("nothing was deleted")
        leave(FAILURE)


@click.command(
    cls=Command,
    examples="""
    lamfs restore flowers/iris.csv flowers/six.csv
    lamfs restore 7hJ2kPq9 --key flowers/iris-again.csv
    """,
)
@click.argument("names", metavar="ARTIFACT…", nargs=-1, required=True)
@click.option("--key", metavar="KEY", help="Bring it back under this key.  [default: the one it had]")
@instance_option
def restore(names: tuple[str, ...], key: str | None, instance: str | None) -> None:
    """Bring artifacts back from the trash.

    They come back to where they were. ARTIFACT is a uid, the key it had, or the path it had in a mount. 'lamfs ls
    --trash' lists what can be restored.
    """
    if key is not None and len(names) > 1:
        raise InvalidArgument("--key is the place of one artifact; restore them one by one.")
    from lamfs.ops import artifacts

    with open_instance(instance, names) as opened:
        for found in [_trashed(opened, name) for name in names]:
            record = artifacts.restore(opened, found, key)
            say(f"restored: {record.uid}  {title(record)}")


def _trashed(opened: Instance, name: str) -> ArtifactRecord:
    """The artifact in the trash that ``name`` means. Raises NotFound."""
    from lamfs.ops import artifacts

    found = artifacts.find(opened, name, trash=True)
    if found.key is not None and not artifacts.in_trash(found):
        # Another artifact has this place now. The one in the trash is still the one that is meant.
        found = opened.registry.artifacts.trashed(found.key) or found
    if not artifacts.in_trash(found):
        raise NotFound(f"'{title(found)}' is not in the trash; 'lamfs ls --trash' lists what is.")
    return found
