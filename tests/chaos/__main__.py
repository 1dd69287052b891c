"""Rounds of chaos.  scripts/soak chaos [--seed N] [--storage folder|s3] [--minutes M] [--only KIND,...]

Each round is a world of its own, whose dice depend on --seed and its number alone: --round K does one of them again.
The first broken promise ends the run: it says what was broken, the last steps, where everything lies as it was left
(mounts are taken away), and the command that replays it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.chaos import faults
from tests.chaos.model import Model
from tests.chaos.operations import Round, Sizes
from tests.chaos.recovery import unmount
from tests.chaos.world import SLUG, Violation, World

FAULT_SHARE = 0.3
"""How many of the steps are things that go wrong."""


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/soak chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=None, help="the dice (default: the time)")
    parser.add_argument("--storage", choices=("folder", "s3"), default="folder")
    parser.add_argument("--minutes", type=float, default=10.0, help="new rounds begin for so long (default: 10)")
    parser.add_argument("--rounds", type=int, default=1 << 30, help="most rounds")
    parser.add_argument("--round", type=int, default=None, help="this round alone")
    parser.add_argument("--steps", type=int, default=30, help="steps of a round (default: 30)")
    parser.add_argument("--only", default=",".join(faults.FAULTS), help=f"kinds of faults: {', '.join(faults.FAULTS)}")
    parser.add_argument("--large", type=float, default=0.5, help="share of files of 100 MiB and more (default: 0.5)")
    parser.add_argument("--large-mib", type=int, default=40, help="at most so many MiB more than 100 (default: 40)")
    parser.add_argument("--most-large", type=int, default=5, help="large files at a time (default: 5)")
    parser.add_argument("--go-on", action="store_true", help="go on with the next round after a broken promise")
    parser.add_argument("--loud", action="store_true", help="print the log as it is written")
    options = parser.parse_args(words)
    options.only = [name for name in options.only.split(",") if name]
    unknown = set(options.only) - faults.FAULTS.keys()
    if unknown:
        parser.error(f"unknown kinds of faults: {', '.join(sorted(unknown))}")
    options.seed = int(time.time()) if options.seed is None else options.seed
    return options


def play(world: World, model: Model, options: argparse.Namespace, number: int) -> None:
    """One round. Raises Violation."""
    rng = random.Random(f"{options.seed}:{number}")
    round = Round(world, model, Sizes(options.large, options.large_mib, options.most_large), rng)
    round.holder.init()
    round.holder.must("mount", str(round.holder.mounts[0].path), "--instance", SLUG, "-o", ",".join(round.holder.words))
    round.holder.mounts[0].mounted = True
    for step in range(1, options.steps + 1):
        world.log.step = step
        world.storage.running()
        # Each step has dice of its own, so that how long one takes changes the next ones as little as can be.
        rng.seed(f"{options.seed}:{number}:{step}")
        if options.only and rng.random() < FAULT_SHARE:
            fault = rng.choice(faults.FAULTS[rng.choice(options.only)])
            world.log.write("fault", name=fault.__name__)
            model.count("faults")
            fault(round)
        else:
            work(round)
        world.check()
    world.log.step = options.steps + 1
    finish(round)


def work(round: Round) -> None:
    """Something ordinary."""
    what = round.rng.random()
    mount = round.mount()
    if what < 0.04:
        round.sync(mount)
    elif what < 0.08 and len(round.holder.active) == 1:
        unmount(round.holder, mount)
        round.model.stored(round.holder.name)
        round.holder.must("mount", str(mount.path), "--instance", SLUG, "-o", ",".join(round.holder.words))
        mount.mounted = True
        faults.exact(round)
    elif what < 0.12:
        faults.exact(round)
    else:
        round.run(round.plan())


def finish(round: Round) -> None:
    """Everything is there at the end, on this machine and, from storage alone, on one that never was there before."""
    faults.exact(round)
    clean = not round.model.blemished and not round.model.broken
    for mount in round.holder.active:
        unmount(round.holder, mount)
    if clean:
        round.holder.must("fsck", "--instance", SLUG)
    round.holder.must("close", SLUG)
    round.world.check()
    last = round.world.machine("Z")
    round.holder = last
    result = last.connect()
    if not result.good:
        raise Violation("refused", f"on a new machine, {result}")
    last.must("mount", str(last.mounts[0].path), "--instance", SLUG, "-o", ",".join(last.words))
    last.mounts[0].mounted = True
    round.model.changed_by = {}
    faults.exact(round)
    unmount(last, last.mounts[0])
    if clean:
        last.must("fsck", "--data", "--instance", SLUG)
    round.world.check()


def report(world: World, model: Model, options: argparse.Namespace, number: int, error: BaseException) -> str:
    """Say what was broken and how to see it again. Returns the command that replays it."""
    words = [f"--seed {options.seed} --storage {options.storage} --round {number} --steps {options.steps}"]
    if options.only != list(faults.FAULTS):
        words.append(f"--only {','.join(options.only)}")
    for name, default in (("large", 0.5), ("large_mib", 40), ("most_large", 5)):
        if getattr(options, name) != default:
            words.append(f"--{name.replace('_', '-')} {getattr(options, name)}")
    command = f"scripts/soak chaos {' '.join(words)}"
    world.log.write("violation", text=str(error))
    logs = world.base / "report"
    logs.mkdir(exist_ok=True)
    for machine in world.machines.values():
        for file in machine.directory.glob("mount.log*"):
            shutil.copy(file, logs / f"{machine.name}.{file.name}")
    claims = [
        {"path": path, "names": sorted(file.names), "digest": file.version.digest, "pieces": file.version.listed(),
         "stored": file.stored, "machine": file.machine}
        for path, file in [*model.tree.items(), *(("(trash)", file) for file in model.trash)]
    ]  # fmt: skip
    (logs / "acknowledged.json").write_text(json.dumps(claims, indent=1))
    (logs / "trace.txt").write_text("".join(traceback.format_exception(error)) + f"\n{command}\n")
    print(f"\nBROKEN  {error}\n", flush=True)
    for other in world.complaints:
        if other is not error:
            print(f"also    {str(other)[:1000]}")
    lines = (world.base / "log.jsonl").read_text().splitlines()
    print("the last steps:")
    for line in lines[-25:]:
        print(f"  {line[:400]}")
    print(f"\neverything: {world.base} (log.jsonl; report/ has the daemons' logs, what was acknowledged, the trace)")
    print(f"again:      {command}", flush=True)
    return command


def one(options: argparse.Namespace, number: int, total: dict[str, int]) -> str | None:
    """One round in a world of its own; the command that replays it when a promise was broken."""
    model = Model()
    broken = None
    began = time.monotonic()
    with World(options.storage, loud=options.loud) as world:
        try:
            play(world, model, options, number)
        except Exception as error:
            # What a fault of the harness itself breaks is reported the same way.
            world.keep()
            broken = report(world, model, options, number, error)
        except KeyboardInterrupt:
            world.keep()
            print(f"\nended in round {number}; what it has done so far: {world.base}", flush=True)
            raise
    for name, count in model.counts.items():
        total[name] = total.get(name, 0) + count
    said = ", ".join(f"{count} {name}" for name, count in sorted(model.counts.items()))
    print(f"round {number}: {'BROKEN' if broken else 'clean'}, {time.monotonic() - began:.0f} s; {said}", flush=True)
    return broken


def main(words: list[str] | None = None) -> int:
    """Rounds until the time is up; 1 when a promise was broken."""
    options = parse(words)
    with ended_by_sigterm():
        return rounds(options)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: nothing stays mounted, no server stays."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def rounds(options: argparse.Namespace) -> int:
    """As main."""
    print(f"chaos: seed {options.seed}, storage {options.storage}, faults {','.join(options.only)}", flush=True)
    total: dict[str, int] = {}
    deadline = time.monotonic() + 60 * options.minutes
    numbers = [options.round] if options.round is not None else range(1, options.rounds + 1)
    broken = []
    count = 0
    for number in numbers:
        if count and time.monotonic() > deadline:
            break
        count += 1
        command = one(options, number, total)
        if command is not None:
            broken.append(command)
            if not options.go_on:
                break
    print(f"\n{count} rounds, {len(broken)} of them broken")
    for name, number in sorted(total.items()):
        print(f"{number:8d}  {name}")
    for command in broken:
        print(command)
    return 1 if broken else 0


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    sys.exit(main())
