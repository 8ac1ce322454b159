"""Any enhancement model in SpeechBrain's pretrained format."""

import functools
import inspect
from pathlib import Path

import torch
import torch.nn.functional as F
from hyperpyyaml import load_hyperpyyaml
from speechbrain.inference.enhancement import SpectralMaskEnhancement, WaveformEnhancement
from speechbrain.inference.separation import SepformerSeparation
from speechbrain.utils.callchains import lengths_arg_exists
from speechbrain.utils.fetching import fetch
from torchaudio.functional import resample

from pi_finetune.enhancers.base import SAMPLE_RATE, WaveformEnhancer
from pi_finetune.errors import UserError

__all__ = ["SPEECHBRAIN_FILE", "SpeechBrainEnhancer"]


SPEECHBRAIN_FILE = "speechbrain.yaml"


class SpeechBrainEnhancer(WaveformEnhancer):
    """Any enhancement model in SpeechBrain's pretrained format, ready to be fine-tuned.

    The folder's ``hyperparams.yaml`` decides which SpeechBrain interface runs it:
    ``SepformerSeparation`` where it has the modules encoder, masknet and decoder (one
    source), ``SpectralMaskEnhancement`` where it has ``enhance_model`` and
    ``compute_stft``, ``spectral_magnitude`` and ``resynth``, ``WaveformEnhancement``
    where it has ``enhance_model`` alone. Loading that file runs the code it names, as
    always with SpeechBrain: use sources you trust.

    These models know no lengths, or use them inexactly, so items of unequal length
    are run one after the other; items of equal length run together. Models of another
    rate are resampled to and from. Resynthesis does not normalise by the peak. How the
    output scales with the input is up to the model.

    Arguments
    ---------
    source : str or Path
        A hub name (``speechbrain/metricgan-plus-voicebank``) or a local folder.
    savedir : str or Path, optional
        Where downloads are linked to (default: the hub's cache alone).
    hparams_file : str
        Name of the YAML file in ``source``.
    pretrained : bool
        Whether to load the source's weights (default True); without, the weights are
        those the YAML file initialises.

    Raises
    ------
    UserError
        Where the source cannot be had or is no enhancement model.
    """

    MIN_SAMPLES = 2048  # shorter inputs are padded up to it: SpeechBrain's parts need a few frames

    def __init__(
        self,
        source: str | Path,
        savedir: str | Path | None = None,
        hparams_file: str = "hyperparams.yaml",
        pretrained: bool = True,
    ):
        source, savedir = str(source), savedir and str(savedir)
        super().__init__(
            source=source, savedir=savedir, hparams_file=hparams_file, pretrained=pretrained
        )
        if not Path(source).is_dir() and (source.count("/") != 1 or source[0] in "./~"):
            raise UserError(
                f"There is no folder {source}: give a local folder with {hparams_file} and the "
                "weights it names, or a hub name such as speechbrain/metricgan-plus-voicebank."
            )
        try:
            path = fetch(hparams_file, source, savedir=savedir)
            self.hparams_text = Path(path).read_text(encoding="utf-8")
            with open(path, encoding="utf-8") as stream:
                hparams = load_hyperpyyaml(stream)
            if pretrained and "pretrainer" in hparams:
                hparams["pretrainer"].set_collect_in(savedir)
                hparams["pretrainer"].collect_files(default_source=source)
                hparams["pretrainer"].load_collected()
        except Exception as error:  # whatever the hub, the YAML or the classes in it raise
            raise UserError(
                f"Cannot load the SpeechBrain model {source}: {type(error).__name__}: {error}. "
                f"Without network, give a local folder with {hparams_file} and its weights."
            ) from error
        interface = self._interface(hparams, f"{source}/{hparams_file}")
        if (
            "resynth" in hparams
            and "normalize_wavs" in inspect.signature(hparams["resynth"]).parameters
        ):
            hparams["resynth"] = functools.partial(hparams["resynth"], normalize_wavs=False)
        self.rate = self._rate(hparams)
        self.interface = interface(
            modules=hparams["modules"],
            hparams=hparams,
            run_opts={"device": "cpu"},
            freeze_params=False,
        )
        self._takes_lengths = "enhance_model" in hparams["modules"] and lengths_arg_exists(
            hparams["modules"]["enhance_model"].forward
        )

    @staticmethod
    def _interface(hparams, where):
        modules = hparams.get("modules") or {}
        if {"encoder", "masknet", "decoder"} <= modules.keys():
            if hparams.get("num_spks", 1) != 1:
                raise UserError(
                    f"{where} separates {hparams['num_spks']} speakers: an enhancer needs a model "
                    "with one source (num_spks: 1)."
                )
            hparams.setdefault("num_spks", 1)
            return SepformerSeparation
        if "enhance_model" in modules:
            if set(SpectralMaskEnhancement.HPARAMS_NEEDED) <= hparams.keys():
                return SpectralMaskEnhancement
            return WaveformEnhancement
        raise UserError(
            f"{where} is no enhancement model known here: its modules are "
            f"{', '.join(modules) or 'none'}; needed are enhance_model, or encoder, masknet and "
            "decoder."
        )

    @staticmethod
    def _rate(hparams):
        stft = hparams.get("compute_stft")
        return int(hparams.get("sample_rate") or getattr(stft, "sample_rate", SAMPLE_RATE))

    def extra_files(self) -> dict:
        """See ``WaveformEnhancer``: the YAML file travels along, the source is not needed again."""
        return {SPEECHBRAIN_FILE: self.hparams_text}

    @classmethod
    def rebuild(cls, folder: str | Path, arguments: dict, trust: bool) -> "SpeechBrainEnhancer":
        """See ``WaveformEnhancer``."""
        if not trust:
            raise UserError(
                f"The model in {folder} is a SpeechBrain model: loading runs the code that its "
                f"{SPEECHBRAIN_FILE} names. Pass trust=True (--trust) if you trust it."
            )
        return cls(folder, hparams_file=SPEECHBRAIN_FILE, pretrained=False)

    def enhance(self, wavs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """See ``WaveformEnhancer``."""
        self.interface.device = str(wavs.device)  # SpeechBrain moves its input there
        enhanced = torch.zeros_like(wavs)
        for length in lengths.unique().tolist():
            if length:
                rows = (lengths == length).nonzero()[:, 0]
                enhanced = enhanced.index_put(
                    (rows,), F.pad(self._equal(wavs[rows, :length]), (0, wavs.shape[1] - length))
                )
        return enhanced

    def _equal(self, wavs):
        """Enhance wavs [B, T] that are all valid."""
        time = wavs.shape[1]
        wavs = F.pad(wavs, (0, max(0, self.MIN_SAMPLES - time)))
        wavs = resample(wavs, SAMPLE_RATE, self.rate)
        out = self._run(wavs)
        if out.shape[1] < wavs.shape[1]:  # e.g. EnhanceResnet drops the last, incomplete frame
            out = self._run(F.pad(wavs, (0, wavs.shape[1] - out.shape[1])))
        out = resample(out, self.rate, SAMPLE_RATE)[:, :time]
        return F.pad(out, (0, time - out.shape[1]))

    def _run(self, wavs):
        if isinstance(self.interface, SepformerSeparation):
            return self.interface.separate_batch(wavs)[..., 0]
        whole = torch.ones(len(wavs), device=wavs.device) if self._takes_lengths else None
        return self.interface.enhance_batch(wavs, lengths=whole)
