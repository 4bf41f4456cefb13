"""Benchmarks run by hand; here, that what they import is still there, and the sampler's own one at the smallest size."""

import os
import re
import subprocess
import sys

from conftest import REPO

TINY = ["model=qwen_image_tiny", "mode=tied", "policy.num_components=3", "policy.logstd_inner_dim=16", "lora.rank=4"]
SMALL = [
    f"bench.{key}" for key in ("latent=4", "text_length=3", "images=2", "steps=2", "repeats=1", "cpu_seconds=true")
]


def test_benchmarks_import_and_the_samplers_says_what_is_outside_the_network() -> None:
    names = sorted(path.stem for path in (REPO / "benchmarks").glob("*.py"))
    code = f"import {', '.join(names)}\nsample.benchmark({[*TINY, *SMALL, 'lora.alpha=4', 'launch.device=cpu']})"
    paths = os.pathsep.join(map(str, (REPO / "benchmarks", REPO)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"student / teacher: [\d.]+ x the images per second, limit 1\n", done.stdout), done.stdout
    assert re.search(r"outside the network: student [\d.]+%, teacher [\d.]+%\n", done.stdout), done.stdout
