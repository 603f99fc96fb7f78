"""`fledge extract`: conversations in, a store of hidden states out. `fledge.extraction.extract` does it."""

from fledge.extraction.settings import ExtractSettings as ExtractArgs

__all__ = ["MAIN", "ExtractArgs", "extract"]

MAIN = (
    "target", "data", "output_dir", "overwrite", "model_max_length", "chat_template_type", "max_samples", "dtype",
    "tap_storage", "last_storage", "batch_tokens", "num_workers", "num_gpus_per_model", "device_map", "tp_plan",
    "target_backend", "server", "num_proc",
)  # fmt: skip


def extract(args: ExtractArgs) -> None:
    """Store the target's hidden states for a data set, so that training needs no target.

    Resumes where it stopped, adds what is new, refuses to mix targets or templates, and checks the disk first. Runs on
    several GPUs under torchrun, or with --num-workers through Ray.
    """
    from fledge.extraction import extract as stage

    stage.extract(args)
