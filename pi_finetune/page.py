"""A page in the browser: upload or record, hear and see what a model makes of it, read the words.

    pi-finetune demo-page --run results/soft_dtw/1234

Nothing is fetched from outside and nothing is sent there: fonts and scripts come from gradio's own
package, and its statistics are off.
"""

import base64
import html
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from pi_finetune.data.audio import SAMPLE_RATE, resample
from pi_finetune.errors import UserError, optional
from pi_finetune.inference import Enhancer
from pi_finetune.lengths import Waveforms
from pi_finetune.recognizers import load_recognizer
from pi_finetune.report.plots import spectrogram_image
from pi_finetune.results.metrics import recognition_errors
from pi_finetune.spectrograms import spectrogram

__all__ = ["LONGEST_SECONDS", "Page", "read_mono"]


#: Longer recordings are refused: the page holds one in memory several times.
LONGEST_SECONDS = 300


class Page:
    """What the page does with a recording; :meth:`blocks` is the page itself.

    Arguments
    ---------
    run : str or Path, optional
        As of :func:`pi_finetune.inference.find_model`. Default: the shipped model.
    asr_source : str, optional
        A recogniser, as of :func:`pi_finetune.recognizers.load_recognizer`. Default: none.
    mix : float
        Share of the enhanced signal that the slider begins with. Default: 1.
    trust : bool
        See :func:`pi_finetune.enhancers.load_enhancer`.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        asr_source: str | None = None,
        mix: float = 1.0,
        trust: bool = False,
    ):
        self.enhancer = Enhancer.from_run(run, trust=trust)
        self.name = "the shipped model" if run is None else "/".join(Path(run).parts[-2:])
        self.recognizer = None if asr_source is None else load_recognizer(str(asr_source))
        self.mix = mix

    @torch.no_grad()
    def enhance(self, path: str, text: str, mix: float) -> tuple[np.ndarray, np.ndarray, str]:
        """Enhance a file.

        Arguments
        ---------
        path : str
            An audio file of any rate and channel count.
        text : str
            What is said, or nothing.
        mix : float
            Share of the enhanced signal, from 0 to 1.

        Returns
        -------
        (numpy.ndarray, numpy.ndarray, str)
            Noisy and enhanced, [T] at 16 kHz, and the HTML of spectrograms and texts.

        Raises
        ------
        UserError
            There is no recording, or it cannot be read or is too long.
        """
        noisy = read_mono(path)
        enhanced = self.enhancer.enhance(torch.from_numpy(noisy), mix=mix).numpy()
        wavs = {"noisy": noisy, "enhanced": enhanced}
        return noisy, enhanced, _pictures(wavs) + self._texts(wavs, (text or "").strip())

    def _texts(self, wavs, said):
        if self.recognizer is None:
            return ""
        rows = [f"<tr><th>said</th><td>{html.escape(said)}</td><td></td></tr>"] if said else []
        for name, wav in wavs.items():
            (heard,) = self.recognizer(Waveforms.of(torch.from_numpy(wav)[None]))
            errors = ""
            if said:
                counts = recognition_errors(self.recognizer, said, heard)
                wrong = sum(counts[k] for k in ("substitutions", "deletions", "insertions"))
                units = counts["hits"] + counts["substitutions"] + counts["deletions"]
                unit = self.recognizer.unit
                errors = f"{unit} errors: {wrong} in {units}"
                errors += f" ({100 * wrong / units:.1f} %)" if units else ""
            rows.append(
                f"<tr><th>{name}</th><td>{html.escape(heard) or '(nothing)'}</td>"
                f'<td class="errors-{name}">{errors}</td></tr>'
            )
        heard_by = html.escape(self.recognizer.name)
        return f"<h3>Heard by {heard_by}</h3><table>{''.join(rows)}</table>"

    def blocks(self) -> Any:
        """The page, a ``gradio.Blocks`` to launch."""
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
        gradio = optional("gradio", "page", "demo-page")
        folder = tempfile.mkdtemp(prefix="pi_finetune-page-")

        def run(path, text, mix):
            try:
                noisy, enhanced, told = self.enhance(path, text, mix)
            except UserError as error:
                raise gradio.Error(str(error)) from None
            files = []
            for name, wav in (("noisy", noisy), ("enhanced", enhanced)):
                # A file of our own and no array: gradio would scale it to its peak.
                file, place = tempfile.mkstemp(suffix=f"-{name}.wav", dir=folder)
                os.close(file)
                soundfile.write(place, wav, SAMPLE_RATE, subtype="FLOAT")
                files.append(place)
            return (*files, told)

        # Files of an hour ago are deleted.
        with gradio.Blocks(
            title="pi_finetune", analytics_enabled=False, delete_cache=(600, 3600)
        ) as page:
            gradio.Markdown(
                f"# What does enhancement do to this recording?\n\nModel: {self.name}. Everything "
                "is computed on the machine that serves this page."
            )
            with gradio.Row():
                given = gradio.Audio(
                    label="Recording", sources=["upload", "microphone"], type="filepath",
                    elem_id="given", buttons=[],
                )  # fmt: skip
                with gradio.Column():
                    text = gradio.Textbox(
                        label="What is said (optional: word errors are counted)",
                        elem_id="said",
                        visible=self.recognizer is not None,
                    )
                    mix = gradio.Slider(
                        0, 1, self.mix, step=0.05, elem_id="mix",
                        label="Share of the enhanced signal; the rest is the recording",
                    )  # fmt: skip
                    button = gradio.Button("Enhance", variant="primary", elem_id="enhance")
            with gradio.Row():
                heard = [
                    gradio.Audio(
                        label=name, interactive=False, elem_id=name.lower(), buttons=["download"]
                    )
                    for name in ("Noisy", "Enhanced")
                ]
            told = gradio.HTML(elem_id="told")
            button.click(run, [given, text, mix], [*heard, told], api_name=False)
        return page

    def launch(self, host: str = "127.0.0.1", port: int | None = None, block: bool = True) -> Any:
        """Serve the page.

        Arguments
        ---------
        host : str
            Address to serve at; ``0.0.0.0`` for other machines. Default: this machine alone.
        port : int, optional
            Default: the first that is free from 7860 on.
        block : bool
            Serve until the process ends; otherwise return at once. Default: True.

        Returns
        -------
        (gradio.Blocks, str)
            The page, and its address.

        Raises
        ------
        UserError
            gradio is missing, or the port is taken.
        """
        page = self.blocks()
        import gradio

        theme = gradio.themes.Base(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        )
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                theme=theme,
                css=_CSS,
                footer_links=[],
                share=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                run_history=False,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise UserError(f"--port {port}: {error}") from None
        if block:
            print(f"{address}  (Ctrl-C ends it)", flush=True)
            page.block_thread()
        return page, address


_CSS = """
#told img { width: 100%; height: auto; image-rendering: auto; }
#told figure { margin: 0 0 1em 0; }
#told td, #told th { padding: 0.2em 0.8em 0.2em 0; text-align: left; vertical-align: top; }
"""


def read_mono(path: str | Path) -> np.ndarray:
    """Read an audio file as the mean of its channels [T], float32, 16 kHz.

    Raises
    ------
    UserError
        There is none, or it cannot be read, is empty, not finite or too long.
    """
    if not path:
        raise UserError("Upload or record something first.")
    try:
        info = soundfile.info(path)
        if info.duration > LONGEST_SECONDS:
            raise UserError(
                f"The recording has {info.duration:.0f} s, more than {LONGEST_SECONDS} s. Use "
                "pi-finetune enhance for long ones."
            )
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{Path(path).name}: cannot be read as audio ({error}).") from None
    if not len(samples) or not np.isfinite(samples).all():
        raise UserError(f"{Path(path).name}: holds no samples, or some that are not finite.")
    wav = resample(np.ascontiguousarray(samples.mean(axis=1))[None], rate, SAMPLE_RATE)[0]
    return np.ascontiguousarray(wav, dtype=np.float32)


def _pictures(wavs):
    """Spectrograms on one scale, as HTML."""
    loudest = max(spectrogram(wav, SAMPLE_RATE).max() for wav in wavs.values())
    figures = []
    for name, wav in wavs.items():
        image = spectrogram_image(wav, SAMPLE_RATE, loudest, width=960)
        data = base64.b64encode(image).decode()
        figures.append(
            f"<figure><figcaption>{name}, 0 to 8 kHz, {len(wav) / SAMPLE_RATE:.1f} s</figcaption>"
            f'<img alt="spectrogram, {name}" src="data:image/webp;base64,{data}"></figure>'
        )
    return "".join(figures)
