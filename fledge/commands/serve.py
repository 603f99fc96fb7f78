"""`fledge serve`: the servers of `fledge.servers.processes`, with the head looked at first.

vLLM loads a wrong head without a word and drafts nothing with it, or crashes a minute into its start. Everything that
can be seen in the head's files is refused before a server starts.
"""

from fledge.console import warn
from fledge.export.servable import check_draft
from fledge.servers import processes
from fledge.servers.processes import ServeArgs, parse_args

__all__ = ["ServeArgs", "parse_args", "serve"]


def serve(args: ServeArgs) -> None:
    """Start one vLLM server per GPU group and keep them running. Arguments after `--` go to vLLM as they are."""
    if args.draft:
        check_draft(args.draft, args.model_name_or_path)
        if not processes.visible_gpus(args.gpus):
            warn(
                "vLLM's CPU build (0.32.0) answers nonsense above temperature 0 as soon as it drafts, with any head: "
                "ask at temperature 0, or serve without --draft (docs/vllm-on-cpu.md)."
            )
    processes.serve(args)
