"""Enhancing recordings: formats, chunks, memory, interruption, the command line."""

import errno
import importlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch

import pi_finetune.soft_dtw
from pi_finetune import __main__ as cli
from pi_finetune import inference
from pi_finetune.data import audio
from pi_finetune.enhancers import ConvTasNet, MaskEnhancer, save_enhancer
from pi_finetune.errors import UserError
from pi_finetune.inference import Enhancer, output_paths

RATE = 16000


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small for threads: waiting for them costs more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def module():
    """A mask network with a reach of under a second that does something to its input."""
    torch.manual_seed(0)
    model = MaskEnhancer(channels=[4, 8], dim=16, dilations=[1, 2], level_frames=20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def enhancer(module):
    return Enhancer(module, device="cpu", chunk_seconds=1)


class Scale(torch.nn.Module):
    """Half the input; remembers the longest window, can be told to fail at the nth call."""

    context = 4000

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        super().__init__()
        self.calls, self.longest, self.fail_at, self.error = 0, 0, fail_at, error

    def forward(self, wavs, lengths):
        self.calls += 1
        self.longest = max(self.longest, wavs.shape[1])
        if self.calls == self.fail_at:
            self.error()
        return 0.5 * wavs


class Gain(torch.nn.Module):
    """Louder by a factor."""

    context = 4000

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, wavs, lengths):
        return self.factor * wavs


class Hum(torch.nn.Module):
    """Adds a tone to whatever it is given."""

    context = RATE

    def forward(self, wavs, lengths):
        return wavs + 0.1 * torch.sin(0.1 * torch.arange(wavs.shape[1]))


def speechlike(seconds, rate=RATE, channels=None, seed=0):
    """Noise below 3 kHz of changing level, within [-1, 1]: [T] or [T, C]."""
    rng = np.random.default_rng(seed)
    size = (int(seconds * rate), channels or 1)
    spectrum = np.fft.rfft(rng.standard_normal(size), axis=0)
    spectrum[np.fft.rfftfreq(size[0], 1 / rate) > 3000] = 0
    wav = np.fft.irfft(spectrum, size[0], axis=0)
    wav *= 0.1 + np.abs(np.sin(np.arange(size[0]) / rate * 2))[:, None]
    wav *= 0.5 / np.abs(wav).max()
    return wav if channels else wav[:, 0]


def relative(x, y):
    return np.abs(np.asarray(x) - np.asarray(y)).max() / np.abs(np.asarray(y)).max()


class TestWaveforms:
    @pytest.mark.parametrize("seconds", [0.0001, 0.3, 1.0, 2.0, 2.5, 4.5, 6.4999, 11.3])
    def test_chunks_leave_no_trace(self, module, enhancer, seconds):
        wav = torch.from_numpy(speechlike(seconds)).float()
        with torch.inference_mode():
            whole = module(wav[None])[0]
        assert whole.abs().max() > 1e-3
        chunked = enhancer.enhance(wav)
        assert chunked.shape == wav.shape
        assert relative(chunked, whole) < 1e-5

    def test_unbounded_model_agrees_in_the_middle_of_chunks(self):
        torch.manual_seed(0)
        model = ConvTasNet(filters=16, kernel=16, bottleneck=8, hidden=16, blocks=3, repeats=1)
        enhancer = Enhancer(model, device="cpu", chunk_seconds=10)
        assert enhancer.context_seconds == inference.UNBOUNDED_CONTEXT
        wav = torch.from_numpy(speechlike(21)).float()
        with torch.inference_mode():
            whole = model(wav[None])[0]
        middle = slice(13 * RATE, 18 * RATE)
        # Not exact: the model normalises by statistics over all that it is given.
        assert relative(enhancer.enhance(wav)[middle], whole[middle]) < 0.1

    @pytest.mark.parametrize("rate", [8000, 11025, 44100, 44099])
    def test_other_rates(self, module, enhancer, rate):
        """As when the whole is resampled, enhanced and resampled back."""
        wav = speechlike(5.7, rate)
        low = audio.resample(wav[None], rate, RATE)
        with torch.inference_mode():
            whole = module(torch.from_numpy(low).float())[0].numpy()
        expected = audio.resample(whole[None], RATE, rate)[0, : len(wav)]
        assert relative(enhancer.enhance(wav, rate), expected) < 1e-3

    def test_rows_by_themselves(self, enhancer):
        wavs = torch.from_numpy(speechlike(1.7, channels=6).T).float()
        together = enhancer.enhance(wavs)
        assert together.shape == wavs.shape
        for row, wav in zip(together, wavs):
            assert relative(row, enhancer.enhance(wav)) < 1e-5

    def test_mix(self, enhancer):
        wav = torch.from_numpy(speechlike(4.3)).float()
        assert torch.equal(enhancer.enhance(wav, mix=0.0), wav)
        half = 0.5 * enhancer.enhance(wav) + 0.5 * wav
        assert torch.allclose(enhancer.enhance(wav, mix=0.5), half, atol=1e-6)

    def test_does_not_change_its_input(self, enhancer):
        wav = torch.from_numpy(speechlike(4.6)).float()
        before = wav.clone()
        enhancer.enhance(wav)
        assert torch.equal(wav, before)

    def test_nothing_and_silence(self, enhancer):
        assert enhancer.enhance(torch.zeros(0)).shape == (0,)
        assert enhancer.enhance(torch.zeros(2, 0)).shape == (2, 0)
        assert (enhancer.enhance(torch.zeros(40000)) == 0).all()

    def test_silence_stays_silence_whatever_the_model_adds(self):
        enhancer = Enhancer(Hum(), device="cpu", chunk_seconds=2)
        assert (enhancer.enhance(torch.zeros(2, 5 * RATE)) == 0).all()
        wav = torch.zeros(9 * RATE)
        wav[4 * RATE : 5 * RATE] = 0.1
        heard = slice(4 * RATE - RATE // 2, 5 * RATE + RATE // 2)
        for chunk_seconds in (2, 20):
            enhanced = Enhancer(Hum(), device="cpu", chunk_seconds=chunk_seconds).enhance(wav)
            assert (enhanced[heard] != 0).float().mean() > 0.99
            enhanced[heard] = 0
            assert (enhanced == 0).all()

    @pytest.mark.parametrize(
        ("wav", "options", "message"),
        [
            (torch.zeros(10, dtype=torch.int16), {}, "floating-point"),
            (torch.zeros(1, 2, 3), {}, "floating-point"),
            (torch.zeros(10), {"mix": 1.1}, "mix must be"),
            (torch.zeros(10), {"sample_rate": 0}, "sample_rate"),
            (torch.tensor([0.0] * RATE + [float("nan")]), {}, "at 1.000 s"),
        ],
    )
    def test_misuse(self, enhancer, wav, options, message):
        with pytest.raises(ValueError, match=message):
            enhancer.enhance(wav, **options)

    @pytest.mark.parametrize(("hop", "step"), [(256, 2), (128, 1), (100, 1), (160, 1)])
    def test_chunks_begin_with_a_frame(self, hop, step):
        torch.manual_seed(0)
        module = MaskEnhancer([4], 8, [1], hop=hop, level_frames=10)
        enhancer = Enhancer(module, device="cpu", chunk_seconds=1)
        assert enhancer.chunk_seconds == enhancer.context_seconds == step
        with torch.no_grad():
            module.mask.conv.weight.mul_(100)
            wav = torch.from_numpy(speechlike(5)).float()
            assert relative(enhancer.enhance(wav), module(wav[None])[0]) < 1e-5

    def test_chunk_must_be_whole_seconds(self, module):
        with pytest.raises(ValueError, match="whole number"):
            Enhancer(module, chunk_seconds=0.5)


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "rate", "channels", "subtype"),
        [
            ("a.wav", 44100, 2, "PCM_24"),
            ("a.wav", 8000, 1, "PCM_16"),
            ("a.wav", 48000, 6, "FLOAT"),
            ("a.wav", 8000, 1, "ULAW"),
            ("a.flac", 16000, 1, "PCM_16"),
            ("a.aiff", 22050, 2, "PCM_16"),
            ("a.ogg", 44100, 2, "VORBIS"),
            ("a.opus", 48000, 1, "OPUS"),
            ("a.mp3", 16000, 1, "MPEG_LAYER_III"),
        ],
    )
    def test_output_is_of_the_kind_of_the_input(
        self, enhancer, tmp_path, name, rate, channels, subtype
    ):
        source, target = tmp_path / name, tmp_path / "out" / name
        kind = {"opus": "OGG"}.get(name[2:], name[2:].upper())
        wav = speechlike(2.8, rate, channels)
        soundfile.write(source, wav, rate, subtype, format=kind)
        enhancer.enhance_file(source, target)
        before, after = soundfile.info(source), soundfile.info(target)
        for attribute in ("frames", "samplerate", "channels", "subtype", "format"):
            assert getattr(after, attribute) == getattr(before, attribute), attribute
        read, _ = soundfile.read(source, dtype="float32", always_2d=True)
        expected = enhancer.enhance(read.T, rate).T.numpy()
        written = soundfile.read(target, always_2d=True)[0]
        lossy = subtype in ("VORBIS", "OPUS", "MPEG_LAYER_III", "ULAW")
        error = np.sqrt(np.mean((written - expected) ** 2) / np.mean(expected**2))
        assert error < (0.3 if lossy else 1e-3)
        assert np.corrcoef(written[:, -1], expected[:, -1])[0, 1] > 0.95

    def test_mix_zero_copies_every_sample(self, enhancer, tmp_path):
        wav = np.random.default_rng(0).integers(-(2**15), 2**15, 60000).astype(np.int16)
        soundfile.write(tmp_path / "in.wav", wav, 11025)
        enhancer.enhance_file(tmp_path / "in.wav", tmp_path / "out.flac", mix=0.0)
        assert (soundfile.read(tmp_path / "out.flac", dtype="int16")[0] == wav).all()

    def test_subtype_that_the_target_lacks(self, enhancer, tmp_path):
        """The nearest PCM, also where libsndfile claims more than it can (MPEG audio in WAV)."""
        for source, target, subtype in (
            (("in.wav", "FLOAT", "WAV"), "out.flac", "PCM_24"),
            (("in.wav", "PCM_U8", "WAV"), "out.flac", "PCM_S8"),
            (("in.flac", "PCM_S8", "FLAC"), "out.wav", "PCM_U8"),
            (("in.wav", "PCM_32", "WAV"), "out.flac", "PCM_24"),
            (("in.mp3", "MPEG_LAYER_III", "MP3"), "out.wav", "PCM_16"),
            (("in.ogg", "VORBIS", "OGG"), "out.wav", "PCM_16"),
            (("in.ogg", "OPUS", "OGG"), "out.flac", "PCM_16"),
            (("in.wav", "PCM_24", "WAV"), "out.ogg", "VORBIS"),
            (("in.wav", "PCM_24", "WAV"), "out.mp3", "MPEG_LAYER_III"),
        ):
            name, encoding, kind = source
            soundfile.write(tmp_path / name, speechlike(0.5), RATE, encoding, format=kind)
            written = enhancer.enhance_file(tmp_path / name, tmp_path / target)
            assert soundfile.info(tmp_path / target).subtype == subtype == written.subtype
            assert written.notice is None

    def test_over_full_scale_is_kept_as_float(self, tmp_path):
        wav = 2.5 * speechlike(5.3)  # half of it has a peak of 0.625
        wav[3 * RATE] = 3.0
        soundfile.write(tmp_path / "in.wav", wav, RATE, "FLOAT")
        loud = Enhancer(Scale(), device="cpu", chunk_seconds=1)
        written = loud.enhance_file(tmp_path / "in.wav", tmp_path / "out.wav")
        assert written.notice is None and written.peak == pytest.approx(1.5)

        soundfile.write(tmp_path / "in.wav", speechlike(5.3), RATE)
        loud = Enhancer(Gain(6), device="cpu", chunk_seconds=1)
        written = loud.enhance_file(tmp_path / "in.wav", tmp_path / "out.wav")
        assert "peak is 3.00 times full scale; written as FLOAT" in written.notice
        assert soundfile.info(tmp_path / "out.wav").subtype == "FLOAT"
        heard = soundfile.read(tmp_path / "out.wav")[0]
        assert relative(heard, 6 * soundfile.read(tmp_path / "in.wav")[0]) < 1e-6

    @pytest.mark.parametrize("suffix", ["flac", "mp3", "ogg"])
    def test_over_full_scale_is_limited_where_there_is_no_float(self, tmp_path, suffix):
        soundfile.write(tmp_path / "in.wav", speechlike(5.3), RATE)
        loud = Enhancer(Gain(3), device="cpu", chunk_seconds=1)
        target = tmp_path / f"out.{suffix}"
        written = loud.enhance_file(tmp_path / "in.wav", target)
        assert written.limited and "a limiter bent" in written.notice
        heard = soundfile.read(target)[0]
        linear = 3 * soundfile.read(tmp_path / "in.wav")[0]
        if suffix == "flac":
            quiet = np.abs(linear) < 0.8
            assert np.abs(heard - linear)[quiet].max() < 1e-4
            assert 0.98 < np.abs(heard).max() < 1
            # Bent, not clipped: different samples stay different.
            loudest = np.abs(linear) > 1.2
            assert len(np.unique(heard[loudest])) > 0.5 * loudest.sum()
            assert np.abs(heard - audio.limit(linear)).max() < 1e-4
        else:
            assert np.corrcoef(heard, audio.limit(linear))[0, 1] > 0.9

    def test_limiter_is_smooth_and_leaves_the_rest(self):
        wav = np.linspace(-4, 4, 80001)
        bent = audio.limit(wav)
        assert (bent == np.where(np.abs(wav) <= 0.8, wav, bent)).all()
        assert np.abs(bent).max() <= 1 and (np.diff(bent) >= 0).all()
        assert np.abs(np.diff(bent, 2)).max() < 1e-6  # no corner

    def test_a_name_that_is_not_utf8(self, enhancer, tmp_path):
        name = os.fsdecode(b"caf\xe9.wav")
        soundfile.write(os.fsencode(tmp_path / name), speechlike(0.5), RATE, format="WAV")
        enhancer.enhance_file(tmp_path / name, tmp_path / "out" / name)
        assert os.listdir(os.fsencode(tmp_path / "out")) == [b"caf\xe9.wav"]

    @pytest.mark.parametrize("full", ["scratch", "target"])
    def test_full_disk_says_what_to_do(self, enhancer, tmp_path, monkeypatch, full):
        """libsndfile calls it "System error."; the disk is then looked at."""
        soundfile.write(tmp_path / "in.wav", speechlike(0.5), RATE)
        if full == "scratch":

            def refuse(target):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(inference, "_scratch", refuse)
        else:

            def fail(*_):
                raise soundfile.LibsndfileError(2)

            monkeypatch.setattr(soundfile.SoundFile, "write", fail)
            usage = shutil.disk_usage(tmp_path)._replace(free=4096)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UserError, match=r"out\.wav: the disk of .* is full\. Free space"):
            enhancer.enhance_file(tmp_path / "in.wav", tmp_path / "out.wav")
        assert os.listdir(tmp_path) == ["in.wav"]

    def test_ten_minutes_at_constant_memory(self, tmp_path):
        source, target, model = tmp_path / "long.wav", tmp_path / "out.wav", Scale()
        wav = np.tile(speechlike(10), 60).astype(np.float32)
        soundfile.write(source, wav, RATE)
        progress = []
        tracemalloc.start()
        Enhancer(model, device="cpu", chunk_seconds=5).enhance_file(
            source, target, progress=progress.append
        )
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 0.1 * wav.nbytes
        assert model.longest <= 11 * RATE
        assert sum(progress) == pytest.approx(600)
        written, _ = soundfile.read(target, dtype="float32")
        assert np.abs(written - 0.5 * wav).max() < 1e-4

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_interruption_leaves_no_partial_file(self, tmp_path, error):
        source, target = tmp_path / "in.wav", tmp_path / "out.wav"
        soundfile.write(source, speechlike(9), RATE)
        target.write_bytes(b"an older result")

        def fail():
            raise error

        with pytest.raises(error):
            Enhancer(Scale(3, fail), device="cpu", chunk_seconds=1).enhance_file(source, target)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.wav", "out.wav"]
        assert target.read_bytes() == b"an older result"

    def test_bad_inputs(self, enhancer, tmp_path):
        (tmp_path / "text.wav").write_text("no audio")
        soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
        soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), RATE, "FLOAT")
        for name, message in (
            ("text.wav", "text.wav cannot be read as audio"),
            ("empty.wav", "empty.wav holds no samples"),
            ("nan.wav", "nan.wav holds samples that are NaN"),
            ("absent.wav", "There is no file .*absent.wav"),
            ("", "cannot be read as audio|There is no file"),
        ):
            with pytest.raises(UserError, match=message):
                enhancer.enhance_file(tmp_path / name, tmp_path / "out.wav")
        assert not (tmp_path / "out.wav").exists() and not list(tmp_path.glob("*.part"))

    def test_bad_outputs(self, enhancer, tmp_path):
        source = tmp_path / "in.wav"
        soundfile.write(source, speechlike(0.5, 44100), 44100)
        (tmp_path / "file").write_text("not a folder")
        for name, message in (
            ("in.wav", "is the input itself"),
            ("out.xyz", "no suffix of an audio format"),
            ("out.opus", "Cannot write .*out.opus: OGG OPUS takes no 1 channels at 44100 Hz"),
            ("file/out.wav", "Cannot write .*out.wav"),
        ):
            with pytest.raises(UserError, match=message):
                enhancer.enhance_file(source, tmp_path / name)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "in.wav"]


class TestPaths:
    @pytest.fixture
    def tree(self, tmp_path):
        for name in ("a.wav", "deep/er/b.FLAC", "deep/notes.txt", "deep/c.opus"):
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    def test_folder_keeps_its_tree(self, tree):
        pairs = output_paths([tree / "in"], tree / "out")
        names = ["a.wav", "deep/c.opus", "deep/er/b.FLAC"]
        assert pairs == [(tree / "in" / name, tree / "out" / name) for name in names]

    def test_file_to_file_or_into_folder(self, tree):
        source = tree / "in" / "a.wav"
        assert output_paths([source], tree / "x.flac") == [(source, tree / "x.flac")]
        assert output_paths([source], tree / "x") == [(source, tree / "x" / "a.wav")]
        assert output_paths([source], tree / "in") == [(source, tree / "in" / "a.wav")]
        several = output_paths([source, tree / "in" / "deep" / "c.opus"], tree / "x")
        assert [target.name for _, target in several] == ["a.wav", "c.opus"]

    def test_results_inside_the_input_are_no_input(self, tree):
        (tree / "in" / "enhanced").mkdir()
        (tree / "in" / "enhanced" / "a.wav").touch()
        assert len(output_paths([tree / "in"], tree / "in" / "enhanced")) == 3

    def test_errors(self, tree):
        (tree / "empty").mkdir()
        (tree / "a.wav").touch()
        for inputs, message in (
            ([tree / "empty"], "no audio file in .*empty"),
            ([tree / "nowhere"], "no file or folder .*nowhere"),
            ([tree / "in" / "a.wav", tree / "a.wav"], "would both be written to"),
        ):
            with pytest.raises(UserError, match=message):
                output_paths(inputs, tree / "out")


class TestCommandLine:
    @pytest.fixture
    def run(self, tmp_path, module):
        save_enhancer(tmp_path / "run", module)
        return tmp_path / "run"

    def test_tree_with_a_bad_file(self, tmp_path, run, capsys):
        for name, rate in (("a.wav", 8000), ("b/c.flac", 44100)):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(tmp_path / "in" / name, speechlike(0.4, rate), rate)
        (tmp_path / "in" / "bad.wav").write_text("no audio")
        arguments = ["enhance", f"{tmp_path}/in", "-o", f"{tmp_path}/out", "--model", str(run)]
        assert cli.main(arguments) == 1
        captured = capsys.readouterr()
        assert "error: " in captured.err and "bad.wav cannot be read" in captured.err
        assert "2 of 3 files enhanced" in captured.out
        written = [p.relative_to(tmp_path / "out") for p in sorted(tmp_path.glob("out/**/*.*"))]
        assert [str(path) for path in written] == ["a.wav", "b/c.flac"]
        first = (tmp_path / "out" / "a.wav").stat().st_mtime_ns
        assert cli.main([*arguments, "--skip-existing"]) == 1
        assert "0 of 1 files" in capsys.readouterr().out
        assert (tmp_path / "out" / "a.wav").stat().st_mtime_ns == first

    def test_a_name_that_is_not_utf8_does_not_stop_the_others(self, tmp_path, run):
        folder = os.fsencode(tmp_path / "in")
        os.mkdir(folder)
        for name in (b"caf\xe9.wav", b"plain.wav", b"bad\xff.wav"):
            soundfile.write(folder + b"/" + name, speechlike(0.3), RATE, format="WAV")
        with open(folder + b"/bad\xff.wav", "wb") as file:
            file.write(b"no audio")
        words = ["enhance", folder, "-o", os.fsencode(tmp_path / "out\udce9"), "--model", str(run)]
        done = subprocess.run(
            [sys.executable, "-m", "pi_finetune", *words], capture_output=True, check=False
        )
        assert done.returncode == 1, done.stderr.decode()
        assert b"2 of 3 files enhanced" in done.stdout and b"Traceback" not in done.stderr
        assert b"bad\\xff.wav cannot be read" in done.stderr
        assert sorted(os.listdir(os.fsencode(tmp_path / "out\udce9"))) == [
            b"caf\xe9.wav",
            b"plain.wav",
        ]

    def test_mix_and_shipped_model(self, tmp_path, run):
        soundfile.write(tmp_path / "in.wav", speechlike(0.5), RATE)
        options = {"shipped": [], "run": ["--model", str(run)], "none": ["--mix", "0"]}
        outputs = {}
        for name, extra in options.items():
            target = tmp_path / f"{name}.wav"
            assert cli.main(["enhance", f"{tmp_path}/in.wav", "-o", str(target), *extra]) == 0
            outputs[name] = soundfile.read(target)[0]
        assert (outputs["none"] == soundfile.read(tmp_path / "in.wav")[0]).all()
        assert relative(outputs["shipped"], outputs["run"]) > 0.01

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            (["--model", "nowhere"], "No enhancer.yaml in nowhere"),
            (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
            (["--device", "abacus"], "--device abacus cannot be used"),
        ],
    )
    def test_errors_are_one_paragraph(self, tmp_path, capsys, extra, message):
        soundfile.write(tmp_path / "in.wav", speechlike(0.2), RATE)
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["enhance", f"{tmp_path}/in.wav", "-o", f"{tmp_path}/out.wav", *extra])
        assert exit_info.value.code == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and message in text and "Traceback" not in text

    @pytest.mark.parametrize("mix", ["1.5", "-0.1", "half", "nan"])
    def test_mix_is_checked(self, mix, capsys):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["enhance", "a.wav", "-o", "b.wav", f"--mix={mix}"])
        assert exit_info.value.code == 2
        assert "is no number from 0 to 1" in capsys.readouterr().err

    def test_help_has_examples(self, capsys):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["enhance", "--help"])
        assert exit_info.value.code == 0
        text = capsys.readouterr().out
        for line in cli.ENHANCE_EXAMPLES.splitlines()[1:]:
            assert line in text
            cli.parser().parse_args(line.split()[1:])

    def test_kill_leaves_no_partial_file(self, tmp_path, run, monkeypatch):
        soundfile.write(tmp_path / "in.wav", speechlike(9), RATE)
        model = Scale(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        loaded = Enhancer(model, device="cpu", chunk_seconds=1)
        monkeypatch.setattr(Enhancer, "from_run", lambda *_, **__: loaded)
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as exit_info:
                cli.main(["enhance", f"{tmp_path}/in.wav", "-o", f"{tmp_path}/out.wav"])
        finally:
            signal.signal(signal.SIGTERM, before)
        assert exit_info.value.code == 128 + signal.SIGTERM
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.wav", "run"]

    def test_doctor(self, capsys, monkeypatch):
        assert cli.main(["doctor"]) == 0
        text = capsys.readouterr().out
        assert f"torch            {torch.__version__.split('+')[0]}" in text
        for name in ("reference", "cpu"):
            assert f"{name:<14}works, forward and backward" in text
        assert "MaskEnhancer" in text and "Nothing is missing." in text

        real_version, real_import = importlib.metadata.version, importlib.import_module

        def version(name):
            if name in ("jiwer", "triton"):
                raise importlib.metadata.PackageNotFoundError(name)
            return real_version(name)

        def broken(name, *rest):
            if name == "pesq":
                raise ImportError("undefined symbol: PyArray_API")
            return real_import(name, *rest)

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib, "import_module", broken)
        monkeypatch.setattr(inference, "DEFAULT_MODEL", inference.DEFAULT_MODEL / "absent")
        assert cli.main(["doctor"]) == 1
        text, missing = capsys.readouterr().out.split("Missing:")
        assert "jiwer            missing" in text and "triton           missing" in text
        assert "pesq             broken (ImportError: undefined symbol: PyArray_API)" in text
        assert "jiwer: pip install jiwer" in missing
        assert "pesq: pip install pesq needs a C compiler" in missing
        assert "shipped enhancer: No enhancer.yaml in " in missing
        assert "triton" not in missing

    def test_doctor_finds_a_wrong_gradient(self, capsys, monkeypatch):
        right = pi_finetune.soft_dtw.soft_dtw

        def wrong(x, y, backend):
            value = right(x, y, backend=backend)
            return value + 0 * value if backend == "reference" else 2 * value - value.detach()

        monkeypatch.setattr(pi_finetune.soft_dtw, "soft_dtw", wrong)
        assert cli.main(["doctor"]) == 1
        text = capsys.readouterr().out
        assert "soft-DTW backend cpu: fails (gradient off by " in text
