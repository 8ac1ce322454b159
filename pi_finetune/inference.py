"""Enhancing recordings with a trained enhancer: any rate, any channels, any length.

    enhancer = Enhancer.from_run("results/soft_dtw/1234")
    enhanced = enhancer.enhance(wav, sample_rate=44100)  # [T] or [B, T]
    enhancer.enhance_file("noisy.wav", "enhanced.wav")

Long recordings go through in chunks, with as much context around each as the
model can see, and are joined by a cross-fade. So memory does not grow with the
length, and for a model of finite reach the chunks leave no trace.
"""

import math
import re
from pathlib import Path

import numpy as np
import soundfile
import torch
from huggingface_hub import snapshot_download
from scipy.signal import resample_poly

from pi_finetune.enhancers import (
    CONFIG_FILE,
    SAMPLE_RATE,
    SPEECHBRAIN_FILE,
    WEIGHTS_FILE,
    load_enhancer,
)
from pi_finetune.errors import UserError
from pi_finetune.files import PROJECT_ROOT, replacing

#: The shipped model.
DEFAULT_MODEL = PROJECT_ROOT / "assets" / "models" / "enhancer"

#: Context on either side for models that see arbitrarily far (recurrent ones), in seconds.
UNBOUNDED_CONTEXT = 5

# A channel of a chunk takes about 0.3 GB in the shipped model; more rows go one group at a time.
_ROWS = 4
_OPUS = (".opus", "OGG", "OPUS")  # a suffix that libsndfile does not map by itself


class Enhancer:
    """A trained enhancer, ready for recordings.

    Arguments
    ---------
    module : torch.nn.Module
        ``module(wavs [B, T], lengths [B]) -> [B, T]`` at 16 kHz.
    device : str or torch.device, optional
        Default: a GPU if there is one.
    chunk_seconds : int
        Recordings are worked through in pieces of this length (default 30), rounded up
        to whole frames.
    """

    def __init__(self, module, device=None, chunk_seconds=30):
        if int(chunk_seconds) != chunk_seconds or chunk_seconds < 1:
            raise ValueError(f"chunk_seconds must be a whole number >= 1, got {chunk_seconds}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.module = module.to(self.device).eval()
        # A chunk begins at a sample that exists at either rate, so after whole seconds, and where
        # a frame of the whole recording begins: after 2 s for a hop of 256 samples.
        grid = getattr(module, "grid", 256)
        step = math.lcm(SAMPLE_RATE, grid) // SAMPLE_RATE
        context = getattr(module, "context", None)
        seconds = UNBOUNDED_CONTEXT if context is None else context / SAMPLE_RATE
        self.context_seconds = step * math.ceil(seconds / step)
        self.chunk_seconds = step * math.ceil(chunk_seconds / step)

    @classmethod
    def from_run(cls, folder=None, device=None, trust=False, **options):
        """Load the best model of a run.

        Arguments
        ---------
        folder : str or Path, optional
            A run folder (``results/STRATEGY/SEED``), any other folder with ``enhancer.yaml`` and
            ``enhancer.safetensors``, or the name of a model on the hub; see ``find_model``
            (default: the shipped model).
        device : str or torch.device, optional
            See ``Enhancer``.
        trust : bool
            See ``enhancers.load_enhancer``.
        **options
            Further arguments of ``Enhancer``.

        Raises
        ------
        UserError
            Where there is no such model, or it cannot be loaded.
        """
        source = find_model(DEFAULT_MODEL if folder is None else folder)
        return cls(load_enhancer(source, trust=trust), device, **options)

    def enhance(self, wav, sample_rate=SAMPLE_RATE, mix=1.0):
        """Enhance waveforms in memory.

        Arguments
        ---------
        wav : torch.Tensor or numpy.ndarray [T] or [B, T]
            Floating-point waveforms; each row is enhanced by itself.
        sample_rate : int
            Their rate in Hz (default 16000). Other rates are resampled to 16 kHz and
            back, which leaves nothing above 8 kHz.
        mix : float
            Share of the enhanced signal, from 0 to 1; the rest is the input.

        Returns
        -------
        torch.Tensor
            Of the shape of ``wav``, float32, on the CPU.
        """
        wav = torch.as_tensor(wav)
        if wav.dim() not in (1, 2) or not wav.is_floating_point():
            raise ValueError(
                f"wav must be floating-point [T] or [B, T], got {wav.dtype} {list(wav.shape)}"
            )
        if wav.numel() == 0:
            return wav.float().cpu()
        rows = wav.detach().float().cpu().reshape(-1, wav.shape[-1]).numpy()
        position = 0

        def read(frames):
            nonlocal position
            position += frames
            return rows[:, position - frames : position]

        pieces = list(self._stream(read, sample_rate, mix))
        return torch.from_numpy(np.concatenate(pieces, axis=1)).reshape(wav.shape)

    def enhance_file(self, source, target, mix=1.0, progress=None):
        """Enhance an audio file into another, at constant memory.

        The output has the length, rate and channels of the input, and its sample format
        where the output's file type has that. It appears only once it is complete.

        Arguments
        ---------
        source, target : str or Path
            Any format that libsndfile reads and writes: wav, flac, ogg, opus, mp3, aiff, ...
        mix : float
            Share of the enhanced signal, from 0 to 1; the rest is the input.
        progress : callable, optional
            Called with the seconds that were finished since the last call.

        Raises
        ------
        UserError
            Where the input cannot be read, is empty or holds non-finite samples, or the
            output cannot be written.
        """
        source, target = Path(source), Path(target)
        if target.exists() and source.exists() and target.samefile(source):
            raise UserError(f"{target} is the input itself: choose another output.")
        with _open(source) as reader:
            rate = reader.samplerate
            kind, subtype = _output_format(target, reader)
            read = _reader(reader, source)
            try:
                with (
                    replacing(target) as temporary,
                    soundfile.SoundFile(
                        temporary, "w", rate, reader.channels, subtype, format=kind
                    ) as writer,
                ):
                    for piece in self._stream(read, rate, mix):
                        # By seconds: libsndfile's Vorbis encoder overflows its stack on long ones.
                        for start in range(0, piece.shape[1], rate):
                            writer.write(piece[:, start : start + rate].T)
                        if progress:
                            progress(piece.shape[1] / rate)
            except (OSError, soundfile.LibsndfileError) as error:
                raise UserError(f"Cannot write {target}: {error}") from error

    def _stream(self, read, rate, mix):
        """Yield pieces [C, n] of what ``read(frames) -> [C, <= frames]`` gives, enhanced."""
        if not 0 <= mix <= 1:
            raise ValueError(f"mix must be from 0 to 1, got {mix}")
        if rate != int(rate) or rate < 1:
            raise ValueError(f"sample_rate must be a whole number of Hz, got {rate}")
        rate = int(rate)
        chunk, context, fade = self.chunk_seconds * rate, self.context_seconds * rate, rate // 2
        ramp = np.linspace(0, 1, fade + 2, dtype=np.float32)[1:-1]
        window, tail = None, None  # the input from ``origin`` on, and what is to be faded out
        origin = start = 0
        while True:
            wanted = start + chunk + fade + context
            have = origin + (0 if window is None else window.shape[1])
            block = read(wanted - have)
            if not np.isfinite(block).all():
                second = (have + int(np.argmin(np.isfinite(block).all(axis=0)))) / rate
                raise ValueError(f"non-finite samples at {second:.3f} s")
            window = block if window is None else np.concatenate([window, block], axis=1)
            available = have + block.shape[1]
            end = min(start + chunk + fade, available)
            last = end == available
            here = slice(start - origin, end - origin)
            piece = self._enhance(window, rate)[:, here] if mix > 0 else window[:, here].copy()
            if tail is not None:
                piece[:, :fade] = ramp * piece[:, :fade] + (1 - ramp) * tail
            piece, tail = (piece, None) if last else (piece[:, :chunk], piece[:, chunk:])
            yield mix * piece + (1 - mix) * window[:, start - origin :][:, : piece.shape[1]]
            if last:
                return
            start += chunk
            drop = max(0, start - context - origin)
            window, origin = window[:, drop:], origin + drop

    @torch.inference_mode()
    def _enhance(self, window, rate):
        """Enhance rows [C, T] at ``rate`` Hz in one go."""
        groups = []
        for rows in np.array_split(window, -(-len(window) // _ROWS)):
            wavs = torch.from_numpy(np.ascontiguousarray(_resample(rows, rate, SAMPLE_RATE)))
            wavs = wavs.to(self.device)
            lengths = torch.full((len(wavs),), wavs.shape[1], device=self.device)
            enhanced = self.module(wavs, lengths).float().cpu().numpy()
            groups.append(_resample(enhanced, SAMPLE_RATE, rate)[:, : window.shape[1]])
        return np.concatenate(groups)


def find_model(source):
    """Find the folder of a model.

    Arguments
    ---------
    source : str or Path
        A folder; or, where there is none of that name, ``owner/name`` on the hub, which is
        downloaded unless it is in the cache. Only the files that make up the model are fetched.
        With HF_HUB_OFFLINE=1 the hub is not contacted.

    Returns
    -------
    str or Path
        The folder.

    Raises
    ------
    UserError
        Where there is neither such a folder nor, as far as can be known, such a model.
    """
    if Path(source).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        return source  # load_enhancer says what is wrong with it
    try:
        return snapshot_download(
            str(source), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, SPEECHBRAIN_FILE]
        )
    except Exception as error:  # network, hub, permissions, disk: all end here
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"There is no folder {source}, and no model of that name could be had from the hub or "
            f"its local cache ({reason}). Give a run folder, or owner/name of a model on the hub."
        ) from error


def output_paths(inputs, output):
    """Pair audio files with the files to write.

    Arguments
    ---------
    inputs : list of str or Path
        Files, and folders that are searched through with all their subfolders.
    output : str or Path
        A file if there is one input file and this has an audio suffix; a folder
        otherwise, in which the tree of each input folder is kept.

    Returns
    -------
    list of (Path, Path)
        Input and output.

    Raises
    ------
    UserError
        Where an input is missing, a folder has no audio, or two inputs would be
        written to the same file.
    """
    output = Path(output)
    inputs = [Path(path) for path in inputs]
    if len(inputs) == 1 and inputs[0].is_file() and not output.is_dir() and _suffix_kind(output):
        return [(inputs[0], output)]
    pairs = []
    for path in inputs:
        if path.is_dir():
            # What was written into the folder itself is no input when the command is repeated.
            files = sorted(
                p
                for p in path.rglob("*")
                if p.is_file() and _suffix_kind(p) and output.resolve() not in p.resolve().parents
            )
            if not files:
                raise UserError(f"There is no audio file in {path} or its subfolders.")
            pairs += [(file, output / file.relative_to(path)) for file in files]
        elif path.exists():
            pairs.append((path, output / path.name))
        else:
            raise UserError(f"There is no file or folder {path}.")
    targets = {}
    for source, target in pairs:
        if target in targets:
            raise UserError(
                f"{targets[target]} and {source} would both be written to {target}: enhance them "
                "one after the other into different folders."
            )
        targets[target] = source
    return pairs


def _resample(rows, rate, new_rate):
    """Resample rows [C, T]; polyphase, so that odd rates need no huge filter bank."""
    common = math.gcd(rate, new_rate)
    if rate == new_rate:
        return rows
    return resample_poly(rows, new_rate // common, rate // common, axis=1).astype(np.float32)


def _open(path):
    try:
        reader = soundfile.SoundFile(path)
    except (OSError, RuntimeError, TypeError) as error:  # TypeError: raw data without a header
        if not path.is_file():
            raise UserError(f"There is no file {path}.") from None
        raise UserError(f"{path} cannot be read as audio: {error}") from error
    if reader.frames == 0:
        reader.close()
        raise UserError(f"{path} holds no samples.")
    return reader


def _reader(reader, path):
    """Return ``read(frames) -> [C, n]`` that names the file when it fails."""

    def read(frames):
        try:
            block = reader.read(frames, dtype="float32", always_2d=True).T
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be read to its end: {error}") from error
        if not np.isfinite(block).all():
            raise UserError(f"{path} holds samples that are NaN or infinite: repair it first.")
        return block

    return read


def _suffix_kind(path):
    """Format and subtype of libsndfile for a suffix, None if it has none."""
    suffix = path.suffix.lower()
    if suffix == _OPUS[0]:
        return _OPUS[1:]
    kind = {"aif": "AIFF", "oga": "OGG"}.get(suffix[1:], suffix[1:].upper())
    return (kind, None) if kind in soundfile.available_formats() and kind != "RAW" else None


def _output_format(target, reader):
    """Format and subtype to write ``target`` in, those of the input where possible."""
    kind = _suffix_kind(target)
    if kind is None:
        raise UserError(
            f"{target} has no suffix of an audio format: use .wav, .flac, .ogg, .opus or .mp3."
        )
    kind, subtype = kind
    if subtype is None:
        same = soundfile.check_format(kind, reader.subtype)
        subtype = reader.subtype if same else soundfile.default_subtype(kind)
    if not soundfile.check_format(kind, subtype):
        raise UserError(f"libsndfile cannot write {target} as {kind} {subtype}.")
    return kind, subtype
