"""``lamfs login``, ``init``, ``connect``, ``instances``, ``close`` and ``delete-instance``. Main thread only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import click

from lamfs.cli.common import json_option
from lamfs.cli.output import columns, print_json, say
from lamfs.cli.seam import Command

F = TypeVar("F", bound=Callable[..., Any])


def storage_options(function: F) -> F:
    """The options for reaching an S3 storage."""
    for option in (
        click.option("--path-style", is_flag=True, help="S3: the bucket in the path, not the host name."),
        click.option("--profile", metavar="NAME", help="S3: profile of the AWS settings files."),
        click.option("--region", metavar="NAME", help="S3: region."),
        click.option("--endpoint-url", metavar="URL", help="S3: another server than AWS."),
    ):
        function = option(function)
    return function


@click.command(cls=Command, examples="lamfs login alice --email alice@example.com")
@click.argument("handle")
@click.option("--email", metavar="ADDRESS", help="E-mail address to record.")
@click.option("--name", metavar="TEXT", help="Full name to record.")
def login(handle: str, email: str | None, name: str | None) -> None:
    """Say who you are.

    HANDLE is the author of what you save from now on. There is no account and no password; without a login the author
    is the user of the operating system.
    """
    from lamfs.ops import setup

    setup.login(handle, email, name, say=say)


@click.command(
    cls=Command,
    examples="""
    lamfs init --storage ~/registry
    lamfs init --storage s3://bucket/prefix --name screens
    lamfs init --storage s3://bucket --endpoint-url http://127.0.0.1:9000 --path-style
    """,
)
@click.option("--storage", required=True, metavar="FOLDER|S3-URL", help="Where the bytes are to be kept.")
@click.option("--name", metavar="NAME", help="Name of the instance.  [default: the last part of the storage]")
@click.option("--owner", metavar="HANDLE", help="Owner of the instance.  [default: you]")
@click.option("--new", is_flag=True, help="Also where an instance was whose registry is gone; see below.")
@storage_options
def init(
    storage: str,
    name: str | None,
    owner: str | None,
    endpoint_url: str | None,
    region: str | None,
    profile: str | None,
    path_style: bool,
    new: bool,
) -> None:
    """Make a new instance.

    It has a registry and a storage, and becomes the current one. An instance that is there already is connected to.
    Where one was whose registry is gone or damaged none is made over it, unless --new is given: the new one then knows
    none of the artifacts that are there, and 'lamfs fsck --repair' gives their objects names in lost+found. Credentials
    for S3 come from where boto3 finds them: the environment, the AWS settings files, a role.
    """
    from lamfs.ops import setup

    setup.init(
        storage,
        name,
        owner,
        endpoint_url=endpoint_url,
        region=region,
        profile=profile,
        path_style=path_style,
        new=new,
        say=say,
    )


@click.command(
    cls=Command,
    examples="""
    lamfs connect alice/screens
    lamfs connect s3://bucket/prefix
    lamfs connect /mnt/share --name theirs
    """,
)
@click.argument("instance")
@click.option("--storage", metavar="FOLDER|S3-URL", help="The storage that holds it, when this machine does not know.")
@click.option("--name", metavar="NAME", help="What to call it here, when another instance has its name.")
@click.option("--restore", is_flag=True, help="Replace this machine's copy of the registry by the one in storage.")
@click.option("--copy", metavar="NAME", help="With --restore: one of the older copies that storage keeps.")
@storage_options
def connect(
    instance: str,
    storage: str | None,
    name: str | None,
    restore: bool,
    copy: str | None,
    endpoint_url: str | None,
    region: str | None,
    profile: str | None,
    path_style: bool,
) -> None:
    """Work with an instance that exists already.

    INSTANCE is the name of one that this machine knows, or the storage that holds its registry; with several instances
    in one storage give the name, and the storage with --storage. It becomes the current one. Two storages may hold
    instances of one name: then this machine calls one of them by another, with --name.
    """
    from lamfs.ops import setup

    setup.connect(
        instance,
        storage=storage,
        name=name,
        restore=restore,
        copy=copy,
        endpoint_url=endpoint_url,
        region=region,
        profile=profile,
        path_style=path_style,
        say=say,
    )


@click.command(cls=Command, examples="lamfs instances")
@json_option
def instances(as_json: bool) -> None:
    """List the instances that this machine knows.

    A star marks the current one.
    """
    from lamfs import config

    current = config.current_slug()
    known = config.list_instances()
    if as_json:
        print_json(
            [
                {
                    "slug": settings.slug,
                    "id": settings.id.hex,
                    "current": settings.slug == current,
                    "storage": {
                        name: value for name, value in dataclasses.asdict(settings.storage).items() if name != "timeout"
                    },
                }
                for settings in known
            ]
        )
        return
    if not known:
        say("This machine knows no instance; 'lamfs init' makes one, 'lamfs mount' a default one.")
    columns(
        [
            "*" if settings.slug == current else " ",
            settings.slug,
            settings.storage.root,
            f"at {settings.storage.endpoint_url}" if settings.storage.endpoint_url else "",
        ]
        for settings in known
    )


@click.command(cls=Command, examples="lamfs close")
@click.argument("instance", required=False)
def close(instance: str | None) -> None:
    """Store everything and unlock an instance.

    Other machines can connect to it then. INSTANCE is the current one by default, and is then no longer current.
    Unmount it first.
    """
    from lamfs.ops import setup

    setup.close(instance, say=say)


@click.command("delete-instance", cls=Command, examples="lamfs delete-instance alice/screens --force")
@click.argument("instance")
@click.option("--force", is_flag=True, help="Also when it holds artifacts.")
def delete_instance(instance: str, force: bool) -> None:
    """Remove an instance.

    What is owed to storage is stored first. Then its registry, lock, settings and cache go; objects of artifacts stay
    in storage, and what storage does not take stays in the spool folder, which is named. Refuses while it holds
    artifacts, or scratch files with bytes, unless --force is given.
    """
    from lamfs.ops import setup

    setup.delete(instance, force=force, say=say)
