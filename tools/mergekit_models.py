"""Records mergekit's results for the configurations in tests/golden/mergekit, without gptailor.

    python tools/mergekit_models.py [NAME …]

Needs mergekit, and runs in the root of the repository. For each NAME.yml (default: all) it has
mergekit merge the models of `tests/mergekit/family.py`, and saves the tensors as
NAME.safetensors.gz. The goldens in the repository come from mergekit 0.1.5 with torch 2.13.
"""

from __future__ import annotations

import gzip
import os
import sys
import tempfile
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.mergekit.family import GOLDEN, save_family


def main(names: list[str]) -> None:
    """Makes the goldens with these names, or all of them."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        save_family(Path(folder))
        os.chdir(folder)  # mergekit resolves local models from there
        for path in sorted(GOLDEN.glob("*.yml")):
            if names and path.stem not in names:
                continue
            config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
            run_merge(config, path.stem, options)
            made = (Path(path.stem) / "model.safetensors").read_bytes()
            kept = path.with_suffix(".safetensors.gz")
            kept.write_bytes(gzip.compress(made, 9, mtime=0))
            print(f"{kept.name:36} {kept.stat().st_size:6}")


if __name__ == "__main__":
    main(sys.argv[1:])
