"""The recipe: search, final training, packed model and ONNX file, each going on where it stopped.

    python run.py --data imagefolder:/data/imagenet --weights resnet18-f37072fd.pth
    python run.py --data webdataset:/data/imagenet-wds --weights resnet18-f37072fd.pth \\
        --address auto --gpus 8

The same command goes on with a run that was stopped. The two studies are `imagenet-search` and
`imagenet-final` in the folder `--out`, and everything that adq-search does with studies works
with them. `--search` and `--final` hand on more options to either, in quotes.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BATCH, LEAST_BATCH = 256, 32
"""Images of a batch, and the fewest of them on each GPU of the final training."""


def adq(*words: str) -> None:
    """Run adq-search; ends with its exit code where that is not 0."""
    program = Path(sys.executable).with_name("adq-search")
    code = subprocess.run([str(program), *words], check=False).returncode
    if code:
        sys.exit(code)


def stage(name: str, options: argparse.Namespace, data: str, more: list[str]) -> None:
    """Begin a study, or go on with it."""
    if (Path(options.out) / name / "study.toml").exists():
        adq("resume", name, "--out", options.out)
        return
    words = ["--config", str(HERE / f"{name.removeprefix('imagenet-')}.toml"), "--task", data]
    words += ["--weights", options.weights, "--study", name, "--out", options.out]
    if options.address:
        words += ["--address", options.address]
    adq(*words, *more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="imagefolder:PATH or webdataset:PATH")
    parser.add_argument("--weights", required=True, help="torchvision's ResNet-18, a file")
    parser.add_argument("--out", default="runs", help="the folder that holds the studies")
    parser.add_argument("--address", help="the Ray cluster: auto, HOST:PORT or local")
    parser.add_argument("--gpus", type=int, default=1, help="that share the final training")
    parser.add_argument("--decoders", type=int, default=8, help="processes per GPU that decode")
    parser.add_argument("--search", default="", help="more options of the search")
    parser.add_argument("--final", default="", help="more options of the final training")
    options = parser.parse_args()
    decoding = f",workers={options.decoders}"
    search, final = shlex.split(options.search), shlex.split(options.final)
    cpus = options.decoders + 1
    if options.address:
        search = ["--cpus-per-trial", str(cpus), *search]
        final = ["--cpus-per-trial", str(cpus * options.gpus), *final]
    if options.gpus > 1:
        final = ["--gpus-per-trial", str(options.gpus), *final]
    batch = max(BATCH, LEAST_BATCH * options.gpus)
    batches = ["", ""] if ",batch=" in options.data else [f",batch={BATCH}", f",batch={batch}"]
    stage("imagenet-search", options, options.data + batches[0] + decoding, search)
    bits = Path(options.out) / "imagenet-search" / "best.bits.json"
    final = ["--layers", str(bits), *final]
    stage("imagenet-final", options, options.data + batches[1] + decoding, final)
    for more in ([], ["--format", "onnx"]):
        adq("export", "imagenet-final", "--out", options.out, *more)


if __name__ == "__main__":
    main()
