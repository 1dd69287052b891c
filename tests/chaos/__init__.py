"""Chaos: operations, kills, take-overs and damage at random, and a model of what was acknowledged.

    scripts/soak chaos --seed 7 --storage s3 --minutes 60       # many rounds, each in a world of its own
    scripts/soak chaos --seed 7 --storage s3 --round 12         # one of them again
    scripts/soak chaos --only kills,wal --steps 20              # these kinds of faults alone

content.py     bytes that say where they come from, so that files need not be kept to be recognised
worker.py      the only program that touches a mount; a stuck mount hangs it and nothing else
world.py       machines (directories, mounts, processes) and the storage that they share; the log of all that was done
model.py       what was acknowledged: which bytes must be under which name, or somewhere
operations.py  what users do: each step with the states in which a crash may leave it
faults.py      what goes wrong: kills, take-overs, damage; what each may cost
recovery.py    what a careful user does then
oracle.py      every acknowledged byte is under its name, in the trash, or in lost+found; what is lost is named
__main__.py    rounds, their report, and how to replay one

The rule. ``close`` = 0: the bytes survive kill -9, on that machine. ``fsync``, ``sync``, ``umount``, ``save`` = 0:
they are in storage. Without damage the newest acknowledged content of a name is under that name, exactly. After damage
every byte of it is somewhere in the tree (lost+found and conflicts are in the tree) or in the trash; only what the
damage itself has destroyed may be missing, and then some message names the file. What was in flight when something was
killed is there as it was or as it was to be, never a mixture (an ordinary write that was killed may be written in part,
page by page, as on a local disk). No call, command or unmount hangs; no traceback is ever seen.
"""
