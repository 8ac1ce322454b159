"""Enhancing recordings with a trained enhancer: any rate, any channels, any length.

    enhancer = Enhancer.from_run("results/soft_dtw/1234")
    enhanced = enhancer.enhance(wav, sample_rate=44100)  # [T] or [B, T]
    enhancer.enhance_file("noisy.wav", "enhanced.wav")

Long recordings go through in chunks, with as much context around each as the
model can see, and are joined by a cross-fade. So memory does not grow with the
length, and the chunks leave no trace: not for a model of finite reach, nor for one
that can go on from its state (:class:`pi_finetune.enhancers.Demucs`).
"""

import io
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import soundfile
import torch
from huggingface_hub import snapshot_download
from scipy.ndimage import maximum_filter1d

from pi_finetune.data.audio import libsndfile_says, limit, resample
from pi_finetune.distributed import choose_device
from pi_finetune.enhancers import (
    CONFIG_FILE,
    SAMPLE_RATE,
    SPEECHBRAIN_FILE,
    WEIGHTS_FILE,
    load_enhancer,
    mixed,
)
from pi_finetune.errors import UserError
from pi_finetune.files import PROJECT_ROOT, replacing, shown, why_not_written
from pi_finetune.lengths import Waveforms

__all__ = [
    "DEFAULT_MODEL",
    "UNBOUNDED_CONTEXT",
    "Enhancer",
    "Written",
    "find_model",
    "output_paths",
]


#: The shipped model.
DEFAULT_MODEL = PROJECT_ROOT / "assets" / "models" / "enhancer"

#: Context on either side for models that see arbitrarily far (recurrent ones), in seconds.
UNBOUNDED_CONTEXT = 5

# A channel of a chunk takes about 0.3 GB in the shipped model; more rows go one group at a time.
_ROWS = 4
_OPUS = (".opus", "OGG", "OPUS")  # a suffix that libsndfile does not map by itself

# Integer encodings by bits; a container has one of the two of 8 bits.
_PCM = {8: ("PCM_U8", "PCM_S8"), 16: ("PCM_16",), 24: ("PCM_24",), 32: ("PCM_32",)}

# Digital silence this far from any sound stays silence, whatever the model makes of it.
_SILENCE_SECONDS = 0.5


@dataclass(frozen=True)
class Written:
    """What :meth:`Enhancer.enhance_file` wrote.

    Attributes
    ----------
    path : Path
    format, subtype : str
        Of libsndfile, e.g. ``WAV`` and ``PCM_16``.
    peak : float
        Largest absolute sample of the enhanced signal; full scale is 1.
    limited : bool
        Whether :func:`~pi_finetune.data.audio.limit` bent samples near and above full scale.
    wanted : str
        The subtype that would have been written, had the peak been within full scale.
    """

    path: Path
    format: str
    subtype: str
    peak: float
    limited: bool
    wanted: str

    @property
    def notice(self) -> str | None:
        """What a user should know of a signal over full scale; None where there is nothing."""
        if self.limited:
            what = f"a limiter bent what is near and above it, since {self.format} has no float"
        elif self.subtype != self.wanted:
            what = f"written as {self.subtype}, which holds it, instead of {self.wanted}"
        else:
            return None
        return f"{shown(self.path)}: the peak is {self.peak:.2f} times full scale; {what}."


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
    whole_seconds : float, optional
        A longer row of a batch is worked through in pieces too, when the enhancer is called.
        Default: none is.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        device: str | torch.device | None = None,
        chunk_seconds: int = 30,
        whole_seconds: float | None = None,
    ):
        if int(chunk_seconds) != chunk_seconds or chunk_seconds < 1:
            raise ValueError(f"chunk_seconds must be a whole number >= 1, got {chunk_seconds}")
        self.device = torch.device(choose_device(device))
        self.module = cast(Any, module.to(self.device).eval())
        # A chunk begins at a sample that exists at either rate, so after whole seconds, and where
        # a frame of the whole recording begins: after 2 s for a hop of 256 samples.
        grid: int = getattr(self.module, "grid", 256)
        step = math.lcm(SAMPLE_RATE, grid) // SAMPLE_RATE
        context: int | None = getattr(self.module, "context", None)
        seconds = UNBOUNDED_CONTEXT if context is None else context / SAMPLE_RATE
        if self._resumes:
            seconds = 3 * self.module.reach / SAMPLE_RATE
        self.context_seconds = step * math.ceil(seconds / step)
        self.chunk_seconds = step * math.ceil(chunk_seconds / step)
        self.whole_seconds = whole_seconds

    def __call__(self, wavs: Waveforms) -> Waveforms:
        """Enhance a batch at 16 kHz, at once but for rows that are too long for it.

        Arguments
        ---------
        wavs : pi_finetune.lengths.Waveforms
            On any device.

        Returns
        -------
        Waveforms
            On the same device.
        """
        limit = math.inf if self.whole_seconds is None else self.whole_seconds * SAMPLE_RATE
        if int(wavs.lengths.max()) <= limit:
            return self.module(wavs)
        rows = [
            self.enhance(row).to(row.device) if len(row) > limit else self.module(row[None])[0]
            for row in wavs.items()
        ]
        return wavs.with_data(Waveforms.collate(rows).data)

    @property
    def _resumes(self):
        """Whether the module goes on in a chunk from its state after the last."""
        return hasattr(self.module, "enhance_window")

    @classmethod
    def from_run(
        cls,
        folder: str | Path | None = None,
        device: str | torch.device | None = None,
        trust: bool = False,
        **options: Any,
    ) -> Self:
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

    def enhance(
        self, wav: torch.Tensor | np.ndarray, sample_rate: int = SAMPLE_RATE, mix: float = 1.0
    ) -> torch.Tensor:
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

        def opened():
            position = 0

            def read(frames):
                nonlocal position
                position += frames
                return rows[:, position - frames : position]

            return read

        pieces = list(self._stream(opened, sample_rate, mix))
        return torch.from_numpy(np.concatenate(pieces, axis=1)).reshape(wav.shape)

    def enhance_file(
        self,
        source: str | Path,
        target: str | Path,
        mix: float = 1.0,
        progress: Callable | None = None,
    ) -> Written:
        """Enhance an audio file into another, at constant memory.

        The output has the length, rate and channels of the input, and its sample format
        where the output's file type has that, else the nearest PCM. It appears only once it is
        complete.

        Nothing is clipped. A signal that exceeds full scale is written as 32-bit float where the
        file type has that (WAV, AIFF, ...); elsewhere (FLAC, MP3, Ogg) a limiter without memory
        bends what is near and above full scale. Either is said in what is returned.

        Arguments
        ---------
        source, target : str or Path
            Any format that libsndfile reads and writes: wav, flac, ogg, opus, mp3, aiff, ...
        mix : float
            Share of the enhanced signal, from 0 to 1; the rest is the input.
        progress : callable, optional
            Called with the seconds that were finished since the last call.

        Returns
        -------
        Written
            Format, peak, and whether it was limited.

        Raises
        ------
        UserError
            Where the input cannot be read, is empty or holds non-finite samples, or the
            output cannot be written.
        """
        source, target = Path(source), Path(target)
        if target.exists() and source.exists() and target.samefile(source):
            raise UserError(f"{shown(target)} is the input itself: choose another output.")
        with _open(source) as reader:
            rate, channels = reader.samplerate, reader.channels
            kind, wanted = _output_format(target, reader)
            opened = _reader(reader, source)
            try:
                # The peak is known at the end only, so the samples wait in a file without a name.
                with _scratch(target) as scratch:
                    peak = 0.0
                    for piece in self._stream(opened, rate, mix):
                        peak = max(peak, float(np.abs(piece).max(initial=0)))
                        scratch.write(piece.T.astype(np.float32).tobytes())
                        if progress:
                            progress(piece.shape[1] / rate)
                    over = peak > 1 and wanted not in ("FLOAT", "DOUBLE")
                    floats = over and _can_write(kind, "FLOAT", rate, channels)
                    subtype = "FLOAT" if floats else wanted
                    written = Written(target, kind, subtype, peak, over and not floats, wanted)
                    scratch.seek(0)
                    with (
                        replacing(target) as temporary,
                        soundfile.SoundFile(
                            os.fsencode(temporary), "w", rate, channels, subtype, format=kind
                        ) as writer,
                    ):
                        # By seconds: libsndfile's Vorbis encoder overflows its stack on long ones.
                        while block := scratch.read(4 * rate * channels):
                            piece = np.frombuffer(block, np.float32).reshape(-1, channels)
                            writer.write(limit(piece) if written.limited else piece)
            except (OSError, AssertionError, soundfile.LibsndfileError) as error:
                # soundfile asserts that all was written, and where the disk is full it was not.
                raise UserError(why_not_written(target, error)) from error
        return written

    def _stream(self, opened, rate, mix):
        """Yield pieces [C, n], enhanced, of what ``opened()`` reads from the beginning on.

        ``opened() -> read`` and ``read(frames) -> [C, <= frames]``.
        """
        if not 0 <= mix <= 1:
            raise ValueError(f"mix must be from 0 to 1, got {mix}")
        if rate != int(rate) or rate < 1:
            raise ValueError(f"sample_rate must be a whole number of Hz, got {rate}")
        rate = int(rate)
        streams = self._streams(opened(), rate) if self._resumes and mix > 0 else None
        chunk, fade = self.chunk_seconds * rate, rate // 2
        ramp = np.linspace(0, 1, fade + 2, dtype=np.float32)[1:-1]
        tail = None  # what is to be faded out
        for window, origin, start, end, last in self._windows(opened(), rate):
            here = slice(start - origin, end - origin)
            if mix > 0:
                piece = self._enhance(window, rate, origin, start + chunk, streams)[:, here]
            else:
                piece = window[:, here].copy()
            if tail is not None:
                piece[:, :fade] = ramp * piece[:, :fade] + (1 - ramp) * tail
            piece, tail = (piece, None) if last else (piece[:, :chunk], piece[:, chunk:])
            yield mixed(piece, window[:, start - origin :][:, : piece.shape[1]], mix)

    def _windows(self, read, rate):
        """Yield windows [C, n] of a recording, and of each ``origin, start, end, last``.

        Samples ``start`` to ``end`` are a chunk and what is faded into the next; from ``origin`` to
        ``start``, and after ``end``, lies context.
        """
        chunk, context, fade = self.chunk_seconds * rate, self.context_seconds * rate, rate // 2
        window, origin, start = None, 0, 0
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
            yield window, origin, start, end, end == available
            if end == available:
                return
            start += chunk
            drop = max(0, start - context - origin)
            window, origin = window[:, drop:], origin + drop

    def _streams(self, read, rate):
        """Where a module that resumes begins: with the scale of the whole recording, by groups."""
        count, total, squares = 0, 0.0, 0.0
        for window, origin, start, _, last in self._windows(read, rate):
            wavs = resample(window, rate, SAMPLE_RATE).astype(np.float64)
            first = (start - origin) * SAMPLE_RATE // rate
            stop = None if last else first + self.chunk_seconds * SAMPLE_RATE
            wavs = wavs[:, first:stop]
            count += wavs.shape[1]
            total = total + wavs.sum(axis=1)
            squares = squares + np.square(wavs).sum(axis=1)
        variance = np.maximum(squares - total**2 / max(count, 1), 0) / max(count - 1, 1)
        scale = torch.from_numpy(np.sqrt(variance)).float().to(self.device)[:, None]
        return [self.module.beginning(rows) for rows in scale.tensor_split(_groups(len(scale)))]

    @torch.inference_mode()
    def _enhance(self, window, rate, origin, following, streams):
        """Enhance rows [C, T] at ``rate`` Hz, which begin at ``origin``, in one go.

        ``streams`` is None, or is moved to where the chunk that begins at ``following`` needs it.
        """
        done = []
        for i, rows in enumerate(np.array_split(window, _groups(len(window)))):
            wavs = torch.from_numpy(np.ascontiguousarray(resample(rows, rate, SAMPLE_RATE)))
            wavs = wavs.to(self.device)
            if streams is None:
                lengths = torch.full((len(wavs),), wavs.shape[1])
                enhanced = self.module(wavs, lengths)
            else:
                first, then = (place * SAMPLE_RATE // rate for place in (origin, following))
                enhanced, streams[i] = self.module.enhance_window(
                    wavs, first, streams[i], then - 2 * self.module.reach
                )
            enhanced = enhanced.float().cpu().numpy()
            done.append(resample(enhanced, SAMPLE_RATE, rate)[:, : window.shape[1]])
        # No wider than the context, so that chunks agree.
        reach = int(min(_SILENCE_SECONDS, self.context_seconds) * rate)
        heard = maximum_filter1d(np.abs(window), 2 * reach + 1, axis=1, mode="constant") > 0
        return np.concatenate(done) * heard


def _groups(rows):
    """Into how many groups so many rows are split."""
    return -(-rows // _ROWS)


def find_model(source: str | Path) -> str | Path:
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


def output_paths(inputs: Sequence[str | Path], output: str | Path) -> list[tuple[Path, Path]]:
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
    paths = [Path(path) for path in inputs]
    if len(paths) == 1 and paths[0].is_file() and not output.is_dir() and _suffix_kind(output):
        return [(paths[0], output)]
    pairs = []
    for path in paths:
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
    if re.fullmatch(r"\.[a-z]+[0-9]*", output.suffix.lower()) and not output.is_dir():
        what = "no audio format" if _suffix_kind(output) is None else "for one input file alone"
        raise UserError(
            f"{shown(output)}: its suffix is {what}. Name a file with .wav, .flac, .ogg, .opus or "
            ".mp3 for one input file, or a folder."
        )
    targets: dict = {}
    for source, target in pairs:
        if target in targets:
            raise UserError(
                f"{targets[target]} and {source} would both be written to {target}: enhance them "
                "one after the other into different folders."
            )
        targets[target] = source
    return pairs


def _open(path):
    try:
        reader = soundfile.SoundFile(os.fsencode(path))  # bytes: a name need not be UTF-8
    except (OSError, RuntimeError, TypeError) as error:  # TypeError: raw data without a header
        if not path.is_file():
            raise UserError(f"There is no file {shown(path)}.") from None
        raise UserError(
            f"{shown(path)} cannot be read as audio: {libsndfile_says(error)}."
        ) from error
    if reader.frames == 0:
        reader.close()
        raise UserError(f"{shown(path)} holds no samples.")
    return reader


def _reader(reader, path):
    """``opened() -> read(frames) -> [C, n]`` that begins anew, and names the file when it fails."""

    def read(frames):
        try:
            block = reader.read(frames, dtype="float32", always_2d=True).T
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{shown(path)} cannot be read to its end: {libsndfile_says(error)}."
            ) from error
        if not np.isfinite(block).all():
            raise UserError(
                f"{shown(path)} holds samples that are NaN or infinite: repair it first."
            )
        return block

    def opened():
        if reader.tell():
            reader.seek(0)
        return read

    return opened


def _suffix_kind(path):
    """Format and subtype of libsndfile for a suffix, None if it has none."""
    suffix = path.suffix.lower()
    if suffix == _OPUS[0]:
        return _OPUS[1:]
    kind = {"aif": "AIFF", "oga": "OGG"}.get(suffix[1:], suffix[1:].upper())
    return (kind, None) if kind in soundfile.available_formats() and kind != "RAW" else None


def _output_format(target, reader):
    """Format and subtype to write ``target`` in: those of the input, or the nearest there is."""
    kind = _suffix_kind(target)
    if kind is None:
        raise UserError(
            f"{shown(target)} has no suffix of an audio format: use .wav, .flac, .ogg, .opus or "
            ".mp3."
        )
    kind, subtype = kind
    if subtype is not None:
        choices = [subtype]
    else:
        named = re.fullmatch(r"(?:PCM|ALAC)_[US]?(\d+)", reader.subtype)
        # Codecs that lose something anyway are decoded to what they were made from, 16 bits.
        bits = int(named[1]) if named else 24 if reader.subtype in ("FLOAT", "DOUBLE") else 16
        depths = sorted(_PCM, key=lambda depth: (depth < bits, abs(depth - bits)))
        pcm = [subtype for depth in depths for subtype in _PCM[depth]]
        choices = [reader.subtype, *pcm, soundfile.default_subtype(kind)]
    for subtype in choices:
        if _can_write(kind, subtype, reader.samplerate, reader.channels):
            return kind, subtype
    raise UserError(
        f"Cannot write {shown(target)}: {kind} {choices[-1]} takes no {reader.channels} channels "
        f"at {reader.samplerate} Hz. Choose another suffix, e.g. .wav or .flac."
    )


def _can_write(kind, subtype, rate, channels):
    """Whether libsndfile can; tried, for it says of some formats that it can and then fails."""
    if not soundfile.check_format(kind, subtype):
        return False
    try:
        soundfile.SoundFile(io.BytesIO(), "w", rate, channels, subtype, format=kind).close()
    except soundfile.LibsndfileError:
        return False
    return True


def _scratch(target):
    """A file without a name on the disk of ``target``, gone when it is closed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=target.parent)
