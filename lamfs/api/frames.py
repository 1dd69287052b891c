"""DataFrames as parquet files, where pandas is installed. Any thread."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from lamfs import config
from lamfs.errors import InvalidArgument, NotSetUp


def pandas() -> ModuleType:
    """The module. Raises NotSetUp when it is not installed."""
    try:
        import pandas as module
    except ImportError as error:
        raise NotSetUp("DataFrames need pandas and pyarrow; install them with: pip install 'lamfs[pandas]'") from error
    return module


def is_frame(data: object) -> bool:
    """Whether this is a DataFrame; does not import pandas."""
    return any(f"{cls.__module__}.{cls.__qualname__}".startswith("pandas.") and cls.__name__ == "DataFrame"
               for cls in type(data).__mro__)  # fmt: skip


def write_parquet(frame: Any) -> Path:
    """Write a DataFrame to a new temporary file, mode 0600. Raises NotSetUp, InvalidArgument."""
    pandas()
    fd, name = tempfile.mkstemp(prefix=f"{config.temporary_name()}-", suffix=".parquet", dir=config.temporary_folder())
    os.close(fd)
    path = Path(name)
    try:
        frame.to_parquet(path)
    except ImportError as error:
        path.unlink(missing_ok=True)
        raise NotSetUp("DataFrames need pyarrow; install it with: pip install 'lamfs[pandas]'") from error
    except Exception as error:
        path.unlink(missing_ok=True)
        raise InvalidArgument(f"The DataFrame cannot be written as parquet: {error}") from error
    return path
