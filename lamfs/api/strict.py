"""Objects that refuse unknown attributes: a mistyped name must not silently do nothing."""

from __future__ import annotations

import difflib

from lamfs.errors import InvalidArgument


class Strict:
    """Only attributes of the class can be set."""

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            kind = type(self).__name__
            known = [one for one in dir(type(self)) if isinstance(getattr(type(self), one), property)]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(sorted(known))}."
            raise AttributeError(f"{kind} has no '{name}' that could be set; {hint}")
        super().__setattr__(name, value)


def check_text(name: str, value: object) -> None:
    """Raise InvalidArgument unless ``value`` is a str or None."""
    if not isinstance(value, str | None):
        raise InvalidArgument(f"{name} is a text, not {type(value).__name__}; {value!r} cannot be used.")
