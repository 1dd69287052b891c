"""Names that LaminDB keeps below ``ln.core``."""

from lamfs.core import storage

__all__ = ["storage"]
