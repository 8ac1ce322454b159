"""Command line: ``python -m pi_finetune enhance`` and ``python -m pi_finetune doctor``."""

import argparse
import importlib
import importlib.metadata
import os
import platform
import signal
import sys

from pi_finetune import __version__
from pi_finetune.errors import UserError, command

ENHANCE_EXAMPLES = """examples:
  python -m pi_finetune enhance noisy.wav -o enhanced.wav
  python -m pi_finetune enhance recordings more.flac -o enhanced --skip-existing
  python -m pi_finetune enhance meeting.mp3 -o out.wav --model results/soft_dtw/1234 --mix 0.8
"""

# What each package is for; those that `pip install` may leave out or break come with a remedy.
PACKAGES = {
    "torch": "pip install -r requirements.txt",
    "torchaudio": "install torch and torchaudio of the same version together (requirements.txt)",
    "speechbrain": "pip install -r requirements.txt",
    "transformers": "pip install -r requirements.txt",
    "safetensors": "pip install -r requirements.txt",
    "numpy": "pip install -r requirements.txt",
    "scipy": "pip install -r requirements.txt",
    "soundfile": "pip install soundfile; on some systems also the package libsndfile1",
    "numba": "pip install numba: the fast soft-DTW on CPUs needs it",
    "triton": "comes with torch on Linux; the soft-DTW on GPUs needs it",
    "pesq": "pip install pesq needs a C compiler, the Python headers and NumPy "
    "(on Debian: apt-get install gcc python3-dev)",
    "pystoi": "pip install pystoi",
    "jiwer": "pip install jiwer",
    "matplotlib": "pip install matplotlib: reports need it",
}
OPTIONAL = {"triton"}


def parser():
    """Build the parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="python -m pi_finetune",
        description="Position-invariant fine-tuning of speech enhancement: use and check.",
    )
    top.add_argument("--version", action="version", version=f"pi_finetune {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    enhance = commands.add_parser(
        "enhance",
        help="enhance audio files",
        description="Enhance audio files and folders of them: any rate, channels and length.",
        epilog=ENHANCE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    enhance.add_argument("inputs", nargs="+", metavar="IN", help="audio files or folders of them")
    enhance.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="output file for one input file, else the folder to write into",
    )
    enhance.add_argument(
        "--model", metavar="RUN", help="run folder of a fine-tuning (default: the shipped model)"
    )
    enhance.add_argument(
        "--mix",
        type=_share,
        default=1.0,
        metavar="0..1",
        help="share of the enhanced signal, the rest is the input (default 1)",
    )
    enhance.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    enhance.add_argument(
        "--skip-existing", action="store_true", help="leave outputs alone that are there already"
    )
    enhance.add_argument(
        "--trust",
        action="store_true",
        help="allow the model folder to run code of its own (SpeechBrain models need it)",
    )
    enhance.set_defaults(run=run_enhance)

    doctor = commands.add_parser(
        "doctor",
        help="show versions, devices and what is missing",
        description="Show versions, devices and soft-DTW backends, and what is missing with its "
        "remedy. The exit status is 0 if nothing needed is missing.",
    )
    doctor.set_defaults(run=run_doctor)
    return top


def _share(text):
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 to 1")
    return value


def run_enhance(options):
    """Enhance all inputs; a file that fails is named and the others go on."""
    import soundfile
    import torch
    from tqdm import tqdm

    from pi_finetune.inference import Enhancer, output_paths

    pairs = output_paths(options.inputs, options.output)
    if options.skip_existing:
        pairs = [(source, target) for source, target in pairs if not target.exists()]
    try:
        enhancer = Enhancer.from_run(options.model, device=options.device, trust=options.trust)
    except RuntimeError as error:  # torch's answer to a device that is not there
        raise UserError(f"--device {options.device} cannot be used: {error}") from error

    def seconds(path):
        try:
            return soundfile.info(path).duration
        except (OSError, RuntimeError, TypeError):
            return 0  # named when its turn comes

    failures = []
    total = sum(seconds(source) for source, _ in pairs)
    layout = (
        "{desc}{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}]"
    )
    with tqdm(total=total, bar_format=layout, disable=None) as bar:
        for source, target in pairs:
            bar.set_description(source.name)
            try:
                enhancer.enhance_file(source, target, options.mix, progress=bar.update)
            except (UserError, torch.OutOfMemoryError) as error:
                failures.append(source)
                tqdm.write(f"error: {error}", file=sys.stderr)
    done = len(pairs) - len(failures)
    print(f"{done} of {len(pairs)} files enhanced: {options.output}")
    return 1 if failures else 0


def run_doctor(options):
    """Print the state of the installation; return 1 if something needed is missing."""
    problems = []
    print(f"pi_finetune {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\npackages")
    for name, remedy in PACKAGES.items():
        try:
            importlib.import_module(name)
            print(f"  {name:<14}{importlib.metadata.version(name)}")
        except Exception as error:  # a broken binary package raises anything
            print(f"  {name:<14}missing ({type(error).__name__}: {error})")
            if name not in OPTIONAL:
                problems.append(f"{name}: {remedy}")
    try:
        import torch
    except Exception:
        return _verdict(problems)

    print("\ndevices")
    print(f"  cpu           {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        print(f"  cuda:{i}        {device.name}, {device.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print("  cuda          none")

    print("\nsoft-DTW backends")
    for name, verdict in _backends(torch):
        print(f"  {name:<14}{verdict}")
        if verdict.startswith("fails") and name != "triton":
            problems.append(f"soft-DTW backend {name}: {verdict}")

    print("\nmodels")
    try:
        from pi_finetune.inference import DEFAULT_MODEL, Enhancer

        enhancer = Enhancer.from_run(device="cpu")
        size = sum(p.numel() for p in enhancer.module.parameters()) / 1e6
        print(f"  enhancer      {type(enhancer.module).__name__}, {size:.2f} M, {DEFAULT_MODEL}")
    except Exception as error:
        print(f"  enhancer      {error}")
        problems.append(f"shipped enhancer: {error}")
    return _verdict(problems)


def _backends(torch):
    """Run each soft-DTW backend on a small problem and compare it with the reference."""
    try:
        from pi_finetune.soft_dtw import soft_dtw
        from pi_finetune.soft_dtw._op import BACKENDS
    except Exception as error:
        return [("all", f"fails ({type(error).__name__}: {error})")]
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 8, generator=generator) for n in (20, 24))
    expected = soft_dtw(x, y, backend="reference")
    results = []
    for name in BACKENDS:
        device = "cuda" if name == "triton" else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            results.append((name, "not used: needs an NVIDIA GPU"))
            continue
        try:
            value = soft_dtw(x.to(device), y.to(device), backend=name).cpu()
            close = torch.allclose(value, expected, rtol=1e-4)
            results.append((name, "works" if close else f"fails (gives {value}, not {expected})"))
        except Exception as error:
            results.append((name, f"fails ({type(error).__name__}: {error})"))
    return results


def _verdict(problems):
    print()
    if not problems:
        print("Nothing is missing.")
        return 0
    print("Missing:")
    for problem in problems:
        print(f"  {problem}")
    return 1


@command
def main(argv=None):
    """Entry point: run the command line, return the exit status."""
    options = parser().parse_args(argv)
    # A polite kill unwinds like Ctrl-C, so that half-written files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
