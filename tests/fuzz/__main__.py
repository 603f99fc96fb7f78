"""`make fuzz`: many cases of every area, a table of what became of them, and every kind of fault with its input."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from fuzz.areas import AREAS, cases_of, shares
from fuzz.harness import Tally, run_cases
from fuzz.table import document, table


def main() -> int:
    """Exit status: 0 when no case ended badly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000, help="How many, over all areas.")
    parser.add_argument("--seed", type=int, default=0, help="Another seed draws other cases.")
    parser.add_argument("--areas", nargs="*", choices=sorted(AREAS), help="Only these.")
    parser.add_argument("--output", type=Path, help="Folder for fuzz.json and fuzz.md.")
    args = parser.parse_args()
    tally, start = Tally(), time.monotonic()
    for area, number in shares(args.cases, args.areas or list(AREAS)).items():
        print(f"{area}: {number} cases", file=sys.stderr, flush=True)
        run_cases(cases_of(area), number, tally, chosen_seed=args.seed)
    found = document(tally, seed=args.seed, seconds=time.monotonic() - start)
    print(table(found))
    for fault in tally.faults.values():
        print(fault.line())
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "fuzz.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (args.output / "fuzz.md").write_text(table(found), encoding="utf-8")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # threads of cases that hung would keep the process
