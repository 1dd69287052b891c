"""The command ``lamfs``. Each module has a group of commands, which import what they need when they run."""

from __future__ import annotations

import click

from lamfs.cli import artifacts, caching, check, listing, mount, settings, setup, status, sync, umount
from lamfs.cli.seam import Program


def print_version(ctx: click.Context, option: click.Parameter, given: bool) -> None:
    """Print the version and end."""
    if given:
        from lamfs import __version__

        click.echo(f"lamfs {__version__}")
        ctx.exit()


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version, help="Print the version."
)
def main() -> None:
    """A registry of artifacts, mounted as a directory.

    Every file in it has a uid, a content hash, an author and an object in storage: a local folder or S3. Start with
    'lamfs mount DIRECTORY', which makes a default instance with a local folder as its storage.
    """


main.add_section("Mounts", mount.mount, umount.umount, sync.sync, status.status)
main.add_section(
    "Artifacts",
    listing.ls,
    listing.info,
    artifacts.save,
    artifacts.replace,
    caching.cache,
    artifacts.delete,
    artifacts.restore,
)
main.add_section(
    "Instances",
    setup.login,
    setup.init,
    setup.connect,
    setup.instances,
    settings.scratch,
    check.fsck,
    setup.close,
    setup.delete_instance,
)
