"""Time a training step by stage: soft-DTW beside MSE, and beside SpeechBrain's teacher with MSE.

    python benchmarks/train_step.py --json FILE
    python benchmarks/train_step.py --teacher_source assets/models/teacher --seconds 6
    python benchmarks/train_step.py --variants speechbrain_mse mse mse+cache mse+cache+compile

A variant is a strategy, or SpeechBrain's; after a plus, ``cache`` keeps the clean branch on disk
(representation_cache, full from the first step on), ``compile`` compiles the teacher's layers,
``bf16`` runs the step under autocast. The teacher is a randomly initialised HuBERT-base unless one
is given (time does not depend on the weights). All variants see the same batch and take turns, so
that what else the machine does falls on all of them; a ratio is the median over repetitions of the
ratio within a repetition. Compare figures of one run only.
"""

import argparse
import collections
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import speechbrain
import torch
import transformers
from speechbrain.integrations.huggingface.hubert import HuBERT

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from pi_finetune.config import build, load_hparams
from pi_finetune.data.audio import SAMPLE_RATE
from pi_finetune.data.loading import UpdateSampler, collate
from pi_finetune.enhancers import load_weights
from pi_finetune.files import write_text
from pi_finetune.lengths import Lasting, Waveforms, shares
from pi_finetune.seeding import utterance_rng
from pi_finetune.teacher import Teacher

ROOT = pathlib.Path(__file__).resolve().parents[1]
VARIANTS = (
    "mse",
    "soft_dtw",
    "soft_dtw_no_speed",
    "speechbrain_mse",
    "mse+cache",
    "soft_dtw+cache",
)
ADDED = ("cache", "compile", "bf16")


def random_base(folder):
    """A HuBERT-base with random weights, as ``transformers`` saves it."""
    torch.manual_seed(0)
    transformers.HubertModel(transformers.HubertConfig()).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return str(folder)


class Clock:
    """Seconds between calls, by name."""

    def __init__(self, device, cpu_time):
        self.device = device
        self.time = time.process_time if cpu_time else time.perf_counter
        self.stages = {}
        self.last = self._now()

    def _now(self):
        if self.device != "cpu":
            torch.cuda.synchronize()
        return self.time()

    def __call__(self, stage):
        now = self._now()
        self.stages[stage] = now - self.last
        self.last = now


class Ours:
    """One step of a strategy's YAML, stage by stage as RepresentationObjective does it."""

    def __init__(self, name, options, teacher, device, precision="fp32"):
        strategy, overrides = name, {"strategy": name, "asr_source": None, **options}
        overrides["select_by"] = "objective"  # the others need a recogniser, or time
        hparams, _ = load_hparams(ROOT / "hparams" / f"{strategy}.yaml", overrides)
        self.data = build(hparams["train_data"])
        self.enhancer = load_weights(hparams["enhancer"], hparams["enhancer_weights"])
        self.enhancer.to(device).train()
        self.optimizer = hparams["opt_class"](self.enhancer.parameters())
        self.objective = hparams["objective"].terms["representation"]
        self.objective.teacher = teacher
        self.max_grad_norm = hparams["max_grad_norm"]
        self.seed = hparams["seed"]
        self.device, self.precision = device, precision

    def compare(self, clock, enhanced, clean, ids):
        rngs = [utterance_rng(self.seed, 0, key, "perturbation") for key in ids]
        objective = self.objective
        y = objective.represent_clean(clean, rngs)
        clock("teacher, clean")
        x = objective.represent_enhanced(enhanced, rngs)
        clock("teacher, enhanced")
        return objective.distance(*x, *y).mean()

    def step(self, clock, ids, noisy, clean):
        batch = collate([self.data[i, 0] for i in ids])
        clock("loading and mixing")
        return self.work(clock, batch.id, noisy, clean)

    def work(self, clock, keys, noisy, clean):
        """All of a step but the loading."""
        device = torch.device(self.device).type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            enhanced = self.enhancer(noisy)
            clock("enhancer")
            loss = self.compare(clock, enhanced, clean, keys)
        clock("distance")
        loss.backward()
        clock("backward")
        torch.nn.utils.clip_grad_norm_(self.enhancer.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock("optimiser")
        return clock.stages


class Plain(Ours):
    """The same step with SpeechBrain's teacher: unfrozen, so that a gradient gets through."""

    def __init__(self, options, teacher, device, precision):
        super().__init__("mse", options, None, device, precision)
        self.teacher = (
            HuBERT(teacher, "", freeze=False).to(device).float().eval().requires_grad_(False)
        )

    def compare(self, clock, enhanced, clean, ids):
        relative = shares(clean.lengths, clean.data.shape[1], clean.data.device)
        y = self.teacher(clean.data, relative)
        clock("teacher, clean")
        x = self.teacher(enhanced.data, relative)
        clock("teacher, enhanced")
        return (x - y).square().mean()


def compiled(source):
    """A teacher whose transformer layers are compiled; the first steps pay for it."""
    teacher = Teacher(source)
    encoder = teacher.encoder
    for layer in (encoder if teacher.family == "whisper" else encoder.encoder).layers:
        layer.compile()
    return teacher


def waveforms(data, ids, samples, device):
    """Noisy and clean ``Waveforms`` of exactly ``samples``: shorter utterances go round."""
    items = [data[i, 0] for i in ids]
    return [
        Waveforms.collate(
            [item[k].repeat(-(-samples // len(item[k])))[:samples] for item in items]
        ).to(device)
        for k in ("noisy", "clean")
    ]


def measure(arguments, folder):
    device = arguments.device
    source = arguments.teacher_source or random_base(pathlib.Path(folder) / "base")
    options = {"segment_seconds": arguments.seconds, "teacher_source": source}
    kept = {"segment_seconds": None, "representation_cache": str(pathlib.Path(folder) / "kept")}
    first = Ours("mse", options, None, device)
    teacher = Teacher(source).to(device)
    variants = {}
    for name in arguments.variants:
        strategy, *added = name.split("+")
        precision = "bf16" if "bf16" in added else arguments.precision
        if strategy == "speechbrain_mse":
            variants[name] = Plain(options, source, device, precision)
            continue
        own = compiled(source).to(device) if "compile" in added else teacher
        chosen = {**options, **(kept if "cache" in added else {})}
        variants[name] = Ours(strategy, chosen, own, device, precision)
    ids = list(range(arguments.batch_size))
    samples = int(arguments.seconds * SAMPLE_RATE)
    noisy, clean = waveforms(first.data, ids, samples, device)
    clean = clean.named([Lasting(f"utterance {i}", i) for i in ids])

    times = {name: [] for name in variants}
    for repeat in range(-1, arguments.repeats + 1):
        names = collections.deque(variants)
        names.rotate(repeat)
        for name in names:
            stages = variants[name].step(Clock(device, arguments.cpu_time), ids, noisy, clean)
            if repeat > 0:  # the first fill the cache, compile and warm up
                times[name].append(stages)
                print(f"{repeat}/{arguments.repeats} {name}: {sum(stages.values()):.2f} s")
    waits = {
        workers: waiting(variants["mse"], arguments, workers)
        for workers in arguments.loader_workers
        if "mse" in variants
    }
    return teacher, times, waits


def waiting(variant, arguments, workers):
    """Median seconds that a step waits for its batch from a real loader, and seconds of the step.

    Wall time, of a training loop with crops and mixtures drawn as in training. The first two
    batches, for which the workers start, do not count.
    """
    batches = arguments.repeats + 2
    sampler = UpdateSampler(len(variant.data), batches * arguments.batch_size, variant.seed)
    loader = torch.utils.data.DataLoader(
        variant.data, arguments.batch_size, sampler=sampler, num_workers=workers,
        collate_fn=collate,
    )  # fmt: skip
    waits, steps, batch_iterator = [], [], iter(loader)
    for _ in range(batches):
        clock = Clock(arguments.device, cpu_time=False)
        batch = next(batch_iterator).to(arguments.device)
        clock("waiting")
        wait = clock.stages.pop("waiting")
        stages = variant.work(clock, batch.id, batch.noisy, batch.clean)
        waits.append(wait)
        steps.append(sum(stages.values()))
    return {"wait": statistics.median(waits[2:]), "step": statistics.median(steps[2:])}


def summary(times):
    """Medians in seconds, and ratios of whole steps."""
    table = {}
    for name, steps in times.items():
        table[name] = {k: statistics.median(step[k] for step in steps) for k in steps[0]}
        table[name]["step"] = statistics.median(sum(step.values()) for step in steps)
    ratios = {}
    for name in times:
        for base in ("mse", "speechbrain_mse"):
            if base in times and name != base:
                pairs = zip(times[name], times[base])
                each = [sum(one.values()) / sum(other.values()) for one, other in pairs]
                ratios[f"{name} / {base}"] = statistics.median(each)
    return table, ratios


def variant(name):
    """A name of the command line, checked."""
    strategy, *added = name.split("+")
    known = strategy in VARIANTS and set(added) <= set(ADDED)
    if not known or (strategy == "speechbrain_mse" and set(added) - {"bf16"}):
        raise argparse.ArgumentTypeError(f"no variant {name}")
    return name


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher_source", help="folder or hub name; default: random HuBERT-base")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), type=variant)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of every utterance")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--loader_workers",
        type=int,
        nargs="*",
        default=[0, 1],
        help="how long an MSE step waits for its batch with so many; default: 0 1",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="processor seconds of this process in place of seconds: for a machine that is busy "
        "with other things; all threads add up",
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write the results there")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        teacher, times, waits = measure(arguments, folder)
    table, ratios = summary(times)
    stages = list(next(iter(table.values())))
    print("\n| seconds | " + " | ".join(table) + " |")
    print("|---|" + "---:|" * len(table))
    for stage in stages:
        print(f"| {stage} | " + " | ".join(f"{row[stage]:.4f}" for row in table.values()) + " |")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    for workers, found in waits.items():
        print(
            f"{workers} loader workers: a step of {found['step']:.3f} s waits "
            f"{1000 * found['wait']:.1f} ms for its batch"
        )
    if arguments.json:
        size = sum(p.numel() for p in teacher.encoder.parameters())
        result = {
            "teacher": {"given": arguments.teacher_source, "family": teacher.family},
            "setting": {
                "teacher_parameters": size,
                "batch_size": arguments.batch_size,
                "seconds": arguments.seconds,
                "repeats": arguments.repeats,
                "threads": arguments.threads,
                "clock": "processor seconds" if arguments.cpu_time else "seconds",
                "device": arguments.device,
                "precision": arguments.precision,
            },
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "cpus": os.cpu_count(),
                "load_average": os.getloadavg()[0],
            },
            "versions": {
                module.__name__: module.__version__ for module in (torch, transformers, speechbrain)
            },
            "median_seconds": table,
            "ratios": ratios,
            "loader_workers": waits,
        }
        write_text(arguments.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
