"""Objects that refuse unknown attributes: a mistyped name must not silently do nothing."""

from __future__ import annotations

import difflib

from lamfs.errors import InvalidArgument


class Strict:
    """Only attributes of the class can be set, and of its properties those with a setter."""

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            near = difflib.get_close_matches(name, self._settable(), n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(self._settable())}."
            raise AttributeError(f"{type(self).__name__} has no '{name}' that could be set; {hint}")
        found = getattr(type(self), name, None)
        if isinstance(found, property) and found.fset is None:
            raise AttributeError(
                f"'{name}' of {type(self).__name__} can be read only; what can be set is {', '.join(self._settable())}."
            )
        super().__setattr__(name, value)

    @classmethod
    def _settable(cls) -> list[str]:
        kinds = ((name, getattr(cls, name)) for name in dir(cls))
        settable = [name for name, kind in kinds if isinstance(kind, property) and kind.fset is not None]
        return [name for name in settable if not name.startswith("_")]


def check_text(name: str, value: object) -> None:
    """Raise InvalidArgument unless ``value`` is a str or None."""
    if not isinstance(value, str | None):
        raise InvalidArgument(f"{name} is a text, not {type(value).__name__}; {value!r} cannot be used.")


def check_flag(name: str, value: object) -> None:
    """Raise InvalidArgument unless ``value`` is True, False or None: ``"no"`` is true, and 0 is not False."""
    if not isinstance(value, bool | None):
        raise InvalidArgument(f"{name} is True, False or None, not {value!r}.")
