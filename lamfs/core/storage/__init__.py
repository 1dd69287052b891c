"""Names that LaminDB keeps below ``ln.core.storage``."""

from lamfs.core.storage import paths

__all__ = ["paths"]
