"""``ln.core.storage.paths``: where objects of artifacts without a real key are."""

from lamfs.model import AUTO_KEY_PREFIX

__all__ = ["AUTO_KEY_PREFIX"]
