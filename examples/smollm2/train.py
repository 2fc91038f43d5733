"""Trains the LoRA adapter of one skill on the CPU.

    python train.py units --out adapters/units

The loss is on the answer's token only. The adapters in adapters/ were made with this script and its
defaults; it is here so that they can be reproduced. `prepare.py` does not need it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

from data import SKILLS, training_questions

HERE = Path(__file__).resolve().parent
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANK = 4
ALPHA = 16
NUM_STEPS = {"units": 220, "grammar": 90, "python": 220}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def learning_rate(step: int, num_steps: int, peak: float, num_warmup: int = 10) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))


def train(
    skill: str, base: Path, *, num_steps: int, batch_size: int, peak: float, seed: int
) -> Any:
    """Return the PEFT model after training; its weights are float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(stock, lora)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    print(f"{skill}: {sum(p.numel() for p in trainable):,} trainable parameters", flush=True)
    optimizer = torch.optim.AdamW(trainable, lr=peak, weight_decay=0.0)
    questions = training_questions(skill, seed)
    start, hits, total_loss = time.monotonic(), 0, 0.0
    for step in range(num_steps):
        batch = list(islice(questions, batch_size))
        inputs = tokenizer([q.question for q in batch], return_tensors="pt", padding=True,
                           padding_side="right")  # fmt: skip
        targets = torch.tensor([tokenizer(" " + q.choices[q.answer]).input_ids for q in batch])
        targets = targets.squeeze(1)  # fails unless every answer is a single token
        hidden_BLD = stock.model(**inputs).last_hidden_state
        last_B = inputs["attention_mask"].sum(1) - 1
        logits_BV = stock.lm_head(hidden_BLD[torch.arange(len(batch)), last_B])
        loss = torch.nn.functional.cross_entropy(logits_BV, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps, peak)
        optimizer.step()
        optimizer.zero_grad()
        hits += int((logits_BV.argmax(-1) == targets).sum())
        total_loss += loss.item()
        if (step + 1) % 20 == 0:
            print(
                f"step {step + 1}/{num_steps}  loss {total_loss / 20:.3f}  "
                f"right word {hits / (20 * batch_size):.1%}  {time.monotonic() - start:.0f} s",
                flush=True,
            )
            hits, total_loss = 0, 0.0
    return model


def save(model: Any, out: Path) -> None:
    """Write the adapter in PEFT's format, in bfloat16, naming the base by its hub id."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    (out / "adapter_model.safetensors").chmod(0o644)
    config_path = out / "adapter_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if value is not None}
    config["base_model_name_or_path"] = BASE_NAME
    config["target_modules"] = sorted(config["target_modules"])
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("skill", choices=SKILLS)
    parser.add_argument("--out", type=Path, required=True, help="the adapter's folder")
    parser.add_argument("--base", type=Path, default=HERE / "models" / "base")
    parser.add_argument("--steps", type=int, help=f"default: {NUM_STEPS}")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.base.is_dir():
        parser.error(f"{args.base} is not a folder: run `python prepare.py --only base` first")
    model = train(
        args.skill,
        args.base,
        num_steps=args.steps or NUM_STEPS[args.skill],
        batch_size=args.batch_size,
        peak=args.learning_rate,
        seed=args.seed,
    )
    save(model, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
