"""How well a linear map hears the content in features of unseen speakers: a teacher and log-mel.

    python tools/probe_features.py --teacher assets/models/teacher --data_folder LibriSpeech \
        --train train-clean-100 --dev dev-clean --test test-clean

One linear layer reads phonemes from a single frame and is trained with CTC, as in the phoneme task
of SUPERB (Yang et al., 2021): there for a sum of the layers with learned weights, here also for
each layer by itself. Every kind of feature is treated alike: zero mean and unit variance of each
dimension over an utterance, the same updates, batches and learning rates; of these the one with the
fewest dev errors counts. Features are the teacher's layers, log-mel energies (80 bands, 25 ms every
20 ms: the teacher's frames), and log-mel with neighbouring frames beside each. Prints a table of
the errors, in percent; with ``--noise_folder`` also those of the test in noise.
"""

import argparse
import sys

import torch
from speechbrain.nnet.losses import ctc_loss
from torch import nn
from torchaudio.functional import melscale_fbanks
from tqdm import tqdm

from pi_finetune.data.audio import SAMPLE_RATE, read_audio
from pi_finetune.data.corpora import prepare_noise, prepare_speech
from pi_finetune.data.loading import choose
from pi_finetune.data.mixing import NoiseMixer
from pi_finetune.data.targets import FIELD, HOP
from pi_finetune.errors import command
from pi_finetune.lengths import Waveforms, as_lengths, shares
from pi_finetune.recognizers import PhonemeTokenizer
from pi_finetune.report.tables import markdown
from pi_finetune.results.metrics import recognition_errors, wer
from pi_finetune.seeding import utterance_rng
from pi_finetune.settings import check_choice
from pi_finetune.teacher import Teacher

BANDS = 80


@command
def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", required=True, help="folder or hub name")
    parser.add_argument("--data_folder", required=True)
    parser.add_argument("--train", nargs="+", required=True, help="splits")
    parser.add_argument("--dev", nargs="+", required=True)
    parser.add_argument("--test", nargs="+", required=True)
    parser.add_argument("--layers", nargs="*", help="of the teacher. Default: all")
    parser.add_argument("--contexts", nargs="*", type=int, default=[1, 3, 9], help="log-mel frames")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.003, 0.01])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_seconds", type=float, help="longest utterance. Default: any")
    parser.add_argument("--noise_folder", help="its test noises are added to a second test")
    parser.add_argument("--snr", type=float, default=5.0, help="in dB (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    tokenizer = PhonemeTokenizer()
    sets = {}
    for part in ("train", "dev", "test"):
        manifest = prepare_speech(args.data_folder, getattr(args, part))
        manifest = {key: entry for key, entry in manifest.items() if entry["text"]}
        sets[part] = choose(manifest, None, args.max_seconds)
    mixers = dict.fromkeys(sets)
    if args.noise_folder:
        sets["noisy"] = sets["test"]
        mixers["noisy"] = NoiseMixer(prepare_noise(args.noise_folder, "test"), [args.snr])
    teacher = Teacher(args.teacher)
    known = {str(name): name for name in teacher.layer_names}
    layers = list(known) if args.layers is None else args.layers
    for layer in layers:
        check_choice("--layers", layer, list(known))
    layers = [known[layer] for layer in layers]
    features = {
        part: all_features(teacher, layers, manifest, args.contexts, mixers[part])
        for part, manifest in sets.items()
    }
    texts = {part: [entry["text"] for entry in m.values()] for part, m in sets.items()}
    tested = [part for part in sets if part != "train"]
    rows = []
    for name, train in tqdm(features["train"].items(), desc="probes", disable=None):
        tried = []
        for lr in args.lrs:
            probe = train_probe(
                train, texts["train"], tokenizer, args.epochs, lr, args.batch_size, args.seed
            )
            errors = [
                wer(transcribed(probe, features[part][name], texts[part], tokenizer))
                for part in tested
            ]
            tried.append((errors[0], lr, errors))
        _, lr, errors = min(tried)
        rows.append(
            [name, str(train[0].shape[-1]), f"{lr:g}", *(f"{error:.1f}" for error in errors)]
        )
    counts = ", ".join(f"{len(lines)} {part}" for part, lines in texts.items())
    print(f"Phoneme errors in percent; utterances: {counts}")
    print(markdown(["features", "dimensions", "rate", *tested], rows))


@torch.no_grad()
def all_features(teacher, layers, manifest, contexts, mixer=None, batch_size=8):
    """``{name: [[F, D] of each utterance]}``, float16, zero mean and unit variance over F.

    Of several layers also ``weighted sum of layers``: all of them, [F, L, D].
    """
    names = [f"layer {name}" for name in layers] + ["weighted sum of layers"] * (len(layers) > 1)
    found = {name: [] for name in (*names, *(_mel_name(frames) for frames in contexts))}
    items = list(manifest.items())
    for first in range(0, len(items), batch_size):
        wavs = [read_audio(entry["wav"]) for _, entry in items[first : first + batch_size]]
        if mixer is not None:
            keys = [key for key, _ in items[first : first + batch_size]]
            draws = (utterance_rng(0, 0, key, "mixture") for key in keys)
            wavs = [mixer(wav, rng)[0] for wav, rng in zip(wavs, draws)]
        states, lengths = teacher.hidden_states(Waveforms.collate(wavs), layers=layers)
        for i, (wav, length) in enumerate(zip(wavs, lengths.tolist())):
            heard = [standardised(state[i, :length]) for state in states]
            for name, x in zip(names, [*heard, torch.stack(heard, 1)]):
                found[name].append(x)
            mel = log_mel(wav)
            for frames in contexts:
                found[_mel_name(frames)].append(standardised(stacked(mel, frames)))
    return found


def _mel_name(frames):
    return f"log-mel, {frames} frame{'s' if frames > 1 else ''}"


def standardised(x):
    """[F, D] with zero mean and unit variance of each dimension, as float16."""
    return ((x - x.mean(0)) / (x.std(0, correction=0) + 1e-5)).half()


def log_mel(wav):
    """Log-mel energies [F, 80] of wav [T], at the frames of the teachers."""
    pieces = wav.unfold(0, FIELD, HOP) * torch.hann_window(FIELD)
    filters = melscale_fbanks(257, 0.0, SAMPLE_RATE / 2, BANDS, SAMPLE_RATE)
    return (torch.fft.rfft(pieces, 512).abs().square() @ filters + 1e-6).log()


def stacked(x, frames):
    """[F, D] to [F, frames * D]: each frame with its neighbours, the edges repeated."""
    reach = frames // 2
    padded = torch.cat([x[:1].expand(reach, -1), x, x[-1:].expand(frames - 1 - reach, -1)])
    return padded.unfold(0, frames, 1).flatten(1)


class Probe(nn.Module):
    """A linear layer, [B, F, D] to [B, F, V]; of [B, F, L, D], of a learned mean of L layers."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.linear = nn.Linear(shape[-1], outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.weights = nn.Parameter(torch.zeros(shape[1])) if len(shape) == 3 else None

    def forward(self, x):
        if self.weights is not None:
            x = torch.einsum("bfld, l -> bfd", x, self.weights.softmax(0))
        return self.linear(x)


def train_probe(features, texts, tokenizer, epochs, lr, batch_size, seed=0):
    """A :class:`Probe` that is trained with CTC at a rate that falls to zero."""
    tokens = [torch.tensor(tokenizer.encode(text)) for text in texts]
    generator = torch.Generator().manual_seed(seed)
    probe = Probe(features[0].shape, len(tokenizer))
    optimizer = torch.optim.Adam(probe.parameters(), lr)
    batches = -(-len(features) // batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(features), generator=generator).split(batch_size):
            x, x_lengths = _padded([features[i] for i in chosen])
            y, y_lengths = _padded([tokens[i] for i in chosen])
            log_probs = probe(x.float()).log_softmax(-1)
            loss = ctc_loss(
                log_probs, y, shares(x_lengths, x.shape[1]), shares(y_lengths, y.shape[1]), 0
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe


@torch.no_grad()
def transcribed(probe, features, texts, tokenizer, batch_size=16):
    """Errors of the probe's best paths, one record an utterance."""
    errors = []
    for first in range(0, len(features), batch_size):
        x, lengths = _padded(features[first : first + batch_size])
        heard = tokenizer.greedy(probe(x.float()).log_softmax(-1), lengths)
        pairs = zip(texts[first : first + batch_size], heard)
        errors += [recognition_errors(tokenizer, *pair) for pair in pairs]
    return errors


def _padded(rows):
    lengths = as_lengths([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


if __name__ == "__main__":
    main(sys.argv[1:])
