"""A run as a repository of the hub."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pi_finetune.errors import UserError
from pi_finetune.export.card import CARD_FILE
from pi_finetune.export.folder import export_run

__all__ = ["Pushed", "push_run"]


class Pushed(NamedTuple):
    """What :func:`push_run` uploaded, or would upload.

    Attributes
    ----------
    repo : str
        Name of the repository.
    private : bool or None
        As asked; None leaves it to the hub.
    files : dict
        ``{name: bytes}``, sorted by name.
    card : str
        The metadata at the head of the model card, as YAML.
    url : str or None
        Of the commit; None of a dry run.
    """

    repo: str
    private: bool | None
    files: dict
    card: str
    url: str | None


def push_run(
    run: str | Path,
    repo: str,
    formats: Sequence[str] = ("speechbrain",),
    trust: bool = False,
    license: str | None = None,
    private: bool | None = None,
    message: str | None = None,
    dry_run: bool = False,
    api: HfApi | None = None,
) -> Pushed:
    """Export a run and upload it as a model to the hub, in one commit.

    Arguments
    ---------
    run, formats, trust, license
        As for :func:`pi_finetune.export.export_run`. The card has the scores of the run's
        evaluation as ``model-index``.
    repo : str
        ``OWNER/NAME``, or NAME for one of the account that is logged in; made if it is missing.
    private : bool, optional
        Whether a repository that is made is private. One that exists stays as it is. Default: as
        the account has it.
    message : str, optional
        Of the commit. Default: names the project and the model.
    dry_run : bool
        Write and describe all files, and send none. Default: False.
    api : huggingface_hub.HfApi, optional
        Default: one with the token of the login.

    Returns
    -------
    Pushed

    Raises
    ------
    UserError
        As of ``export_run``; or the name is none, or the hub refuses.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        export_run(run, folder, formats, trust, license)
        files = {p.name: p.stat().st_size for p in sorted(Path(folder).iterdir())}
        card = ModelCard.load(Path(folder, CARD_FILE))
        pushed = Pushed(repo, private, files, str(card.data), None)
        if dry_run:
            return pushed
        api = api or HfApi()
        try:
            made = api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
            commit = api.upload_folder(
                repo_id=made.repo_id,
                folder_path=folder,
                repo_type="model",
                commit_message=message or f"pi_finetune: {card.data.model_name or Path(run).name}",
            )
        except Exception as error:  # of the hub, the network or the login: their words say which
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(
                f"{repo}: the hub did not take it ({reason}). Log in with `hf auth login`, unset "
                "HF_HUB_OFFLINE, or look with --dry_run at what would be uploaded."
            ) from error
    return pushed._replace(repo=made.repo_id, url=str(commit.commit_url))
