"""Every domain error carries the errno that the mount answers with, and a sentence."""

from __future__ import annotations

import errno
import os

import pytest

from lamfs import errors
from lamfs.errors import FsError, InvalidArgument, InvalidName, LamfsError, StorageError

ERRNOS = {
    "LamfsError": errno.EIO,
    "NotFound": errno.ENOENT,
    "AlreadyExists": errno.EEXIST,
    "InvalidName": errno.EINVAL,
    "InvalidArgument": errno.EINVAL,
    "NotSetUp": errno.ENOENT,
    "NotEmpty": errno.ENOTEMPTY,
    "RegistryError": errno.EIO,
    "Locked": errno.EBUSY,
    "StorageError": errno.EIO,
    "StorageUnavailable": errno.EIO,
    "UploadGone": errno.EIO,
    "StorageMissing": errno.ENOENT,
    "StorageForbidden": errno.EACCES,
    "StorageReadOnly": errno.EROFS,
    "StorageFull": errno.ENOSPC,
    "ObjectMissing": errno.EIO,
    "ObjectChanged": errno.ESTALE,
    "PreconditionFailed": errno.EEXIST,
    "DamagedData": errno.EIO,
    "TransferDied": errno.EIO,
}


def all_errors() -> list[type[LamfsError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, LamfsError)]


@pytest.mark.parametrize(("name", "number"), ERRNOS.items())
def test_errno(name: str, number: int) -> None:
    error = getattr(errors, name)("The thing; the cause; the next step.")
    assert error.errno == number
    assert str(error) == "The thing; the cause; the next step."


@pytest.mark.parametrize("kind", [kind for kind in all_errors() if kind is not FsError])
def test_every_error_has_a_real_errno_a_message_of_its_own_and_a_docstring(kind: type[LamfsError]) -> None:
    assert kind().errno in errno.errorcode
    assert str(kind()) == os.strerror(kind().errno)
    assert kind.__doc__


@pytest.mark.parametrize("kind", [kind for kind in all_errors() if kind is not FsError])
def test_errno_can_be_given_for_one_error_alone(kind: type[LamfsError]) -> None:
    assert kind("text", errno=errno.EDQUOT).errno == errno.EDQUOT
    assert kind("text").errno == kind.errno != errno.EDQUOT


def test_fs_error_is_its_errno() -> None:
    assert FsError(errno.ENOTEMPTY).errno == errno.ENOTEMPTY
    assert str(FsError(errno.ENOTEMPTY)) == os.strerror(errno.ENOTEMPTY)
    assert str(FsError(errno.ENOTEMPTY, "the folder is full")) == "the folder is full"


def test_wrong_names_and_arguments_are_value_errors_for_a_notebook() -> None:
    assert issubclass(InvalidName, ValueError)
    assert issubclass(InvalidArgument, ValueError)


def test_only_what_time_can_cure_is_retryable() -> None:
    retryable = {kind.__name__ for kind in all_errors() if issubclass(kind, StorageError) and kind.retryable}
    assert retryable == {"StorageUnavailable", "StorageFull", "UploadGone"}
