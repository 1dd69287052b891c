"""scripts/bench: lamfs beside other mounts of the same S3 server. See --help."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from tests.bench import report, rows_api, rows_data, rows_tree, table
from tests.bench.bench import ROWS, SCALES, Bench
from tests.bench.systems import ALL

RECORDED = (rows_data, rows_tree, rows_api)  # importing them registers their rows


def main() -> int:
    """Run the rows that were asked for."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "--delay", type=float, default=0.0, metavar="MS", help="milliseconds added to each request to S3"
    )
    parser.add_argument("--server", choices=("seaweedfs", "ministack"), default="seaweedfs", help="the S3 server")
    parser.add_argument("--rows", default="", help="only these rows: 1,2,API (default: all)")
    parser.add_argument(
        "--systems", default="", help="only these: lamfs,juicefs,juicefs-wb,rclone,s3fs,lamindb,local,passthrough"
    )
    parser.add_argument("--repetitions", type=int, default=3, metavar="N")
    parser.add_argument(
        "--scale", choices=tuple(SCALES), default="full", help="tiny: a trial; huge: 100,000 files, 1,000,000 artifacts"
    )
    parser.add_argument("--output", type=Path, default=Path("bench-report"), help="writes OUTPUT.md and OUTPUT.json")
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="JSON", help="measure nothing: print the README's table of reports"
    )
    arguments = parser.parse_args()
    if arguments.table:
        print("\n".join(table.lines(arguments.table)))
        return 0
    wanted = [word.strip() for word in arguments.systems.split(",") if word.strip()] or [kind.name for kind in ALL]
    if unknown := set(wanted) - {kind.name for kind in ALL}:
        parser.error(f"there is no system {', '.join(sorted(unknown))}")
    numbers = [word.strip() for word in arguments.rows.split(",") if word.strip()]
    if unknown := set(numbers) - {row.number for row in ROWS}:
        parser.error(
            f"there is no row {', '.join(sorted(unknown))}; the rows are {', '.join(row.number for row in ROWS)}"
        )
    rows = [row for row in ROWS if not numbers or row.number in numbers]
    if os.geteuid() != 0:
        print("bench: only root can drop the page cache; run it as root", file=sys.stderr)
        return 1
    versions = {kind.name: kind.version() for kind in ALL if kind.name in wanted}
    for name, found in versions.items():
        print(f"{name}: {found or 'not installed, skipped (scripts/bench --install installs the peers)'}", flush=True)
    command = "scripts/bench " + " ".join(word for word in sys.argv[1:])
    bench = Bench(
        SCALES[arguments.scale], arguments.delay / 1000, arguments.server, [n for n, v in versions.items() if v]
    )
    try:
        with bench.running() as systems:
            for row in rows:
                print(f"{row.number}. {row.title}", flush=True)
                bench.run(row, systems, arguments.repetitions, lambda text: print(text, flush=True))
                text = report.markdown(bench, rows, versions, arguments.repetitions, command)
                arguments.output.with_suffix(".md").write_text(text)
                arguments.output.with_suffix(".json").write_text(report.as_json(bench, versions, command))
    finally:
        shutil.rmtree(bench.base, ignore_errors=True)
    print(f"written: {arguments.output}.md and {arguments.output}.json")
    return 1 if any(", lamfs:" in text for text in bench.failures) else 0


if __name__ == "__main__":
    sys.exit(main())
