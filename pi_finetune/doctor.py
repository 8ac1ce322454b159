"""What is installed, what works and what is missing: ``pi-finetune doctor``."""

import importlib
import importlib.metadata
import os
import platform

from pi_finetune import __version__

__all__ = ["OPTIONAL", "PACKAGES", "examine"]

# What each package is for; those that `pip install` may leave out or break come with a remedy.
PACKAGES = {
    "torch": "pip install -r requirements.txt",
    "torchaudio": "install torch and torchaudio of the same version together (requirements.txt)",
    "speechbrain": "pip install -r requirements.txt",
    "transformers": "pip install -r requirements.txt",
    "safetensors": "pip install -r requirements.txt",
    "huggingface_hub": "pip install -r requirements.txt",
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
    "submitit": "pip install submitit: ablations need it",
    "loky": "pip install loky: evaluation and validation need it",
    "gruut": "pip install 'pi_finetune[phonemes]': phoneme recognition needs it",
    "speechmos": "pip install 'pi_finetune[metrics]': DNSMOS needs it, librosa and onnxruntime",
    "onnxscript": "pip install 'pi_finetune[onnx]': export --format onnx needs it",
    "lhotse": "pip install 'pi_finetune[corpora]': cuts as --data_folder need it",
    "datasets": "pip install 'pi_finetune[corpora]': --data_folder hf:NAME needs it",
    "gradio": "pip install 'pi_finetune[page]': demo-page needs it",
    "pyroomacoustics": "pip install 'pi_finetune[rooms]': --rir_folder simulated needs it",
}
#: Those whose libraries may not fit the machine or torch: they are imported to see.
BINARY = ("torch", "torchaudio", "soundfile", "numba", "pesq")
OPTIONAL = {
    "triton",
    "gruut",
    "speechmos",
    "onnxscript",
    "lhotse",
    "datasets",
    "pyroomacoustics",
    "gradio",
}


def examine() -> int:
    """Print versions, devices, backends and what is missing; 1 if something needed is missing."""
    problems = []
    print(f"pi_finetune {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\npackages")
    for name, remedy in PACKAGES.items():
        try:
            print(f"  {name:<17}{importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            if name in OPTIONAL:
                print(f"  {name:<17}missing ({remedy})")
            else:
                print(f"  {name:<17}missing")
                problems.append(f"{name}: {remedy}")
    for name in BINARY:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken binary package raises anything
            print(f"  {name:<17}broken ({type(error).__name__}: {error})")
            problems.append(f"{name}: {PACKAGES[name]}")
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
    """Value and gradient of each soft-DTW backend on a small problem, against the reference."""
    try:
        from pi_finetune.soft_dtw import soft_dtw
        from pi_finetune.soft_dtw._op import BACKENDS
    except Exception as error:
        return [("all", f"fails ({type(error).__name__}: {error})")]
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 8, generator=generator) for n in (20, 24))

    def run(name, device):
        leaf = x.to(device).requires_grad_()
        value = soft_dtw(leaf, y.to(device), backend=name)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return {"value": value.detach().cpu(), "gradient": gradient.cpu()}

    expected = run("reference", "cpu")
    results = []
    for name in BACKENDS:
        device = "cuda" if name == "triton" else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            results.append((name, "not used: needs an NVIDIA GPU"))
            continue
        try:
            found = run(name, device)
            wrong = [
                f"{part} off by {(found[part] - right).abs().max():.2g}"
                for part, right in expected.items()
                if not torch.allclose(found[part], right, rtol=1e-4, atol=1e-5)
            ]
            verdict = f"fails ({', '.join(wrong)})" if wrong else "works, forward and backward"
            results.append((name, verdict))
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
