"""Real noisy recordings without references: the data set of a manifest of them."""

import hashlib
import json
from pathlib import Path

from torch.utils.data import Dataset

from pi_finetune.data.audio import SAMPLE_RATE
from pi_finetune.data.layouts import prepare_recordings, read_recording
from pi_finetune.data.loading import choose

__all__ = ["Recordings", "load_recordings", "prepare_recordings", "read_recording"]


class Recordings(Dataset):
    """Recordings without references, addressed by index, as noisy speech.

    In the place of :class:`pi_finetune.data.loading.SpeechPairs` where systems are scored. An item
    has no ``clean``, and its ``snr`` and ``noise_class`` are None.

    Arguments
    ---------
    manifest : dict
        From :func:`prepare_recordings`.
    """

    has_clean = False

    def __init__(self, manifest: dict):
        self.manifest = manifest
        self.ids = list(manifest)

    def __len__(self):
        return len(self.ids)

    def item_id(self, index: int) -> str:
        """The id of the recording at ``index``, without reading audio."""
        return self.ids[index]

    def item_text(self, index: int) -> str | None:
        """The transcript of the recording at ``index``, or None."""
        return self.manifest[self.ids[index]]["text"]

    def seconds(self) -> list[float]:
        """Length of each recording in seconds."""
        return [entry["duration"] for entry in self.manifest.values()]

    def fingerprint(self) -> str:
        """A short digest of which parts of which recordings these are, file contents aside."""
        parts = [
            (key, *(entry[name] for name in ("start", "duration", "rate", "channel")))
            for key, entry in self.manifest.items()
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def __getitem__(self, index):
        key = self.ids[index]
        entry = self.manifest[key]
        noisy = read_recording(entry)
        return {
            "id": key,
            "noisy": noisy,
            "recording": key,
            "speaker": entry["speaker"],
            "text": entry["text"],
            "duration": len(noisy) / SAMPLE_RATE,
            "snr": None,
            "noise_class": None,
        }


def load_recordings(
    source: str | Path, channel: int | None = None, count: int | None = None
) -> Recordings:
    """The data set of some recordings, for use in YAML.

    Arguments
    ---------
    source, channel
        As for :func:`prepare_recordings`.
    count : int, optional
        So many of them, spread over speakers, see :func:`pi_finetune.data.loading.choose`.
        Default: all.

    Returns
    -------
    Recordings
    """
    manifest = prepare_recordings(source, channel=channel)
    return Recordings(manifest if count is None else choose(manifest, count))
