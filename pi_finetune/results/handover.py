"""The audio of an evaluation for other tools: FLAC, and Kaldi's lists of it.

``FOLDER/STRATEGY/SEED`` gets ``enhanced.scp``, ``noisy.scp``, ``clean.scp`` (where there is clean
speech) and ``text`` (where there are transcripts): lines ``ID PATH`` or ``ID TEXT``, sorted by id,
paths absolute. VERSA reads them with ``--io soundfile``, the scripts of the URGENT challenge as
``--inf_scp`` and ``--ref_scp``, ESPnet as data folders.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pi_finetune.data.audio import save_flac
from pi_finetune.errors import UserError
from pi_finetune.files import shown, why_not_written, write_text

if TYPE_CHECKING:
    pass

__all__ = ["SavedAudio"]


#: Of the folder of what every system is given: the noisy and the clean speech.
INPUTS = "inputs"


class SavedAudio:
    """The audio of one system, written while it is scored.

    Arguments
    ---------
    root : str or Path
        The folder for all systems of a test set. A path with a blank is refused, since URGENT's
        scripts part their lines at blanks.
    system : str
        ``STRATEGY/SEED``.
    enhances : str
        What the system gives: ``enhanced`` speech, or what it was given as it is, ``noisy`` or
        ``clean``.
    ids : list of str
        Of the test set. In file names and lists, blanks and slashes in them become ``_``.
    """

    def __init__(self, root: str | Path, system: str, enhances: str, ids: list[str]):
        self.root = Path(root).absolute()
        self.folder = self.root / system
        self.enhances = enhances
        if len(str(self.folder).split()) > 1:
            raise UserError(
                f"--save_audio {shown(root)}: {shown(self.folder)} has a blank, at which the "
                "readers of its lists part a line. Name another folder."
            )
        self.names: dict = {}
        taken: dict = {}
        for id_ in ids:
            name = re.sub(r"[\s/]+", "_", id_)
            if taken.setdefault(name, id_) != id_:
                raise UserError(
                    f"--save_audio: {taken[name]!r} and {id_!r} would both be {name}. Rename one."
                )
            self.names[id_] = name

    def begin(self, settings: dict, overwrite: bool = False) -> None:
        """Take the folder, or go on in it.

        Arguments
        ---------
        settings : dict
            ``pairs``, the fingerprint of the test set, and what else the audio depends on.
        overwrite : bool
            Discard the system's audio made with other settings.

        Raises
        ------
        UserError
            Audio of another test set or made with other settings is there, or the folder cannot be
            written.
        """
        inputs = {"pairs": settings["pairs"]}
        if _differs(self.root / INPUTS, inputs):
            raise UserError(
                f"--save_audio {shown(self.root)} holds the audio of another test set. Name "
                "another folder."
            )
        if changed := _differs(self.folder, settings):
            if not overwrite:
                raise UserError(
                    f"{shown(self.folder)} holds audio made with other {', '.join(changed)}. Add "
                    "--overwrite, or name another folder with --save_audio."
                )
            for path in (*self.folder.glob("audio/*.flac"), *self.folder.glob("*.scp")):
                path.unlink()
        for folder, values in ((self.root / INPUTS, inputs), (self.folder, settings)):
            self._write(folder / "settings.json", json.dumps(values, indent=1))

    def path(self, id_: str, kind: str) -> Path:
        """The file of an utterance: ``enhanced``, ``noisy`` or ``clean``."""
        kind = self.enhances if kind == "enhanced" else kind
        folder = self.folder / "audio" if kind == "enhanced" else self.root / INPUTS / kind
        return folder / f"{self.names[id_]}.flac"

    def has(self, id_: str, kinds: Sequence[str]) -> bool:
        """Whether all the files of an utterance are there."""
        return all(self.path(id_, kind).is_file() for kind in kinds)

    def write(self, id_: str, wavs: dict) -> None:
        """Write what is not there yet of ``{kind: waveform [T]}``, each file whole or not at all.

        What several systems are given is written by the first.
        """
        for kind, wav in wavs.items():
            if not self.path(id_, kind).is_file():
                save_flac(self.path(id_, kind), wav)

    def finish(self, kinds: Sequence[str], texts: dict) -> None:
        """Write the lists, when all audio is there.

        Arguments
        ---------
        kinds : tuple of str
            Which lists: ``enhanced``, ``noisy``, and ``clean`` where there is clean speech.
        texts : dict
            Transcripts by id; None where there is none.
        """
        order = sorted(self.names, key=self.names.__getitem__)
        for kind in kinds:
            lines = [f"{self.names[id_]} {self.path(id_, kind)}\n" for id_ in order]
            self._write(self.folder / f"{kind}.scp", "".join(lines))
        lines = [
            f"{self.names[id_]} {' '.join(texts[id_].split())}\n" for id_ in order if texts[id_]
        ]
        if lines:
            self._write(self.folder / "text", "".join(lines))

    def _write(self, path, text):
        try:
            write_text(path, text)
        except OSError as error:
            raise UserError(why_not_written(path, error)) from error


def _differs(folder, settings):
    """Names of the settings that audio which is there was made with other values of."""
    path = folder / "settings.json"
    if not path.is_file():
        return []
    try:
        earlier = json.loads(path.read_text())
    except ValueError:
        earlier = {}
    return [key for key in settings if earlier.get(key) != settings[key]]
