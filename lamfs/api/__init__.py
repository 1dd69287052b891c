"""The Python API: what ``import lamfs as ln`` shows. Usable from any thread."""

from lamfs.ops.messages import show_messages

show_messages()
