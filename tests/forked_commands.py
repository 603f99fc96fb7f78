"""Commands in forks of a process that has only imported them: '[["run", WORDS], ["kill", 25, FOLDER, WORDS], ...]'.

A process that has trained must not be forked (threads of autograd), and starting Python anew for each attempt would
take minutes of imports. The steps:

    run WORDS            to the end
    kill N FOLDER WORDS  N times, each after a random share of what the last run took; a finished FOLDER is put aside
    together WORDS       twice at once
    umask MASK WORDS     to the end, under this umask

Prints a JSON list of what each step came to: exit statuses, or how many were killed.
"""

import json
import os
import sys
import time
from pathlib import Path

from kills import finish, kill_again_and_again, start

import fledge.bench.engine
import fledge.bench.run
import fledge.commands.regenerate
import fledge.export.convert
import fledge.extraction.extract
import fledge.regeneration.local_engine
import fledge.train.run  # noqa: F401
from fledge.cli import run_command


def main(steps: list[list]) -> list[object]:
    found: list[object] = []
    took_s = 1.0
    for kind, *rest in steps:
        name, *words = map(str, rest[-1])

        def work(name=name, words=words, mask=rest[0] if kind == "umask" else None) -> int:
            if mask is not None:
                os.umask(mask)
            return run_command(name, words)

        began = time.monotonic()
        if kind == "kill":
            found.append(kill_again_and_again(work, longest_s=took_s, kills=rest[0], folder=Path(rest[1])))
        elif kind == "together":
            children = [start(work), start(work)]
            found.append(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
        else:
            found.append(finish(work))
            took_s = time.monotonic() - began
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
