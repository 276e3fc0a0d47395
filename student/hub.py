"""Push a student to the Hugging Face Hub."""

from __future__ import annotations

import os

from huggingface_hub import HfApi

from teachercache.pipeline.errors import CheckpointError
from teachercache.student.models.student import CONFIG_FILE, WEIGHTS_FILE, find_saved, read_config

CARD_FILE = "README.md"


def push_to_hub(folder: str | os.PathLike[str], repository: str, *, private: bool = False) -> str:
    """Upload a saved student, with its model card if it has one, and return the address.

    `repository`: "user/name", created if missing. Logs in as huggingface_hub does (HF_TOKEN).
    Raises `CheckpointError` if the folder does not hold a complete student, or the Hub refuses it.
    """
    place = find_saved(folder)
    read_config(place)
    if not (place / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"The student in {place} has no weights.",
            got=f"no {WEIGHTS_FILE}",
            expected=f"a {CONFIG_FILE} and a {WEIGHTS_FILE} that save_pretrained() wrote together",
            do="copy or download the folder again",
        )
    api = HfApi()
    files = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        uploaded = api.upload_folder(repo_id=repository, folder_path=place, allow_patterns=files)
    except Exception as error:  # huggingface_hub's own, ValueErrors and those of its HTTP client
        raise CheckpointError(
            f"The student was not pushed to {repository}.",
            got=error,
            expected="a repository on the Hugging Face Hub that you may write to",
            do="log in with `hf auth login` or HF_TOKEN, and check the name (user/name)",
        ) from error
    return str(uploaded.repo_url)
