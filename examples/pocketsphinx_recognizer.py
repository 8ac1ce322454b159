"""Your own recogniser: PocketSphinx, an engine of the years before neural networks.

    pip install pocketsphinx
    PYTHONPATH=examples python recipes/evaluate.py hparams/evaluate.yaml --run noisy \\
        --recognizers "[!new:pocketsphinx_recognizer.PocketSphinx {}]"

A recogniser is anything with ``name``, ``unit`` and ``recognizer(waveforms) -> [text]``; what can
give likelihoods has ``nll`` too, see ``pi_finetune.recognizers.LikelyRecognizer``.
This one has no part of any training here and is easily led astray by noise: a second opinion.
"""

import re

import pocketsphinx


class PocketSphinx:
    """American English, with the models that the package brings along.

    Arguments
    ---------
    **options
        Of ``pocketsphinx.Decoder``. ``maxhmmpf: 10000`` (a third of the default) takes 0.6 times as
        long where there is noise.

    Attributes
    ----------
    name : str
        Under which its scores are kept.
    unit : str
        What a text is made of: ``word``.
    """

    name, unit = "pocketsphinx", "word"

    def __init__(self, **options):
        self.options = {"samprate": 16000, "loglevel": "FATAL", **options}

    def __call__(self, wavs):
        """Transcribe :class:`pi_finetune.lengths.Waveforms`."""
        texts = []
        for wav in wavs.items():
            samples = (wav.cpu().clamp(-1, 1) * 32767).short().numpy()
            decoder = pocketsphinx.Decoder(**self.options)  # a new one: it adapts to a speaker
            decoder.start_utt()
            decoder.process_raw(samples.tobytes(), full_utt=True)
            decoder.end_utt()
            heard = decoder.hyp()
            # "read(2)" is the second way to say "read"
            texts.append(re.sub(r"\(\d+\)", "", heard.hypstr) if heard else "")
        return texts
