"""Uploading an exported head. The only file that knows huggingface_hub's write side.

Only what a reader needs goes up: config, weights and model card. export.json holds local paths and stays here.
"""

import re
from pathlib import Path

from fledge.errors import UserError

UPLOADED = ("config.json", "model.safetensors", "README.md")
REPOSITORY = re.compile(r"^[\w.-]+/[\w.-]+$")


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Create the repository when it is not there, upload the head in one commit, and return its address."""
    if not REPOSITORY.match(repository):
        raise UserError(f"--push-to-hub {repository}: a hub repository is named NAME/HEAD. Nothing was uploaded.")
    if absent := [name for name in UPLOADED if not (folder / name).is_file()]:
        raise UserError(f"{folder}: {', '.join(absent)} missing, so nothing was uploaded. Export the head again.")
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise UserError(
            f"no hub token found, so nothing was uploaded. Log in with `hf auth login`, or set HF_TOKEN. The export "
            f"itself is complete in {folder}."
        )
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=str(folder), allow_patterns=list(UPLOADED),
            commit_message="Upload an EAGLE-3 draft head",
        )  # fmt: skip
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        denied = "Set HF_TOKEN to a token that may write there, or choose a repository of your own."
        raise UserError(
            f"the hub refused {repository} ({status}: {_first_line(error)}). "
            f"{denied if status in (401, 403) else 'Try again later.'} The export is in {folder}."
        ) from None
    except Exception as error:
        if not _no_network(error):
            raise
        raise UserError(
            f"the hub cannot be reached ({_first_line(error)}). The export is complete in {folder}; upload it later "
            f"with the same command."
        ) from None
    return str(address)


def _no_network(error: Exception) -> bool:
    """Whether the hub's HTTP client (which one depends on its version) got no answer, or was told not to ask."""
    return isinstance(error, OSError) or any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
