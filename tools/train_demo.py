"""Make the demo family that ships in gptailor/demo: documents, a base model, three finetunes.

    python tools/train_demo.py            # everything, then the table of tools/check_demo.py

It is seeded and runs on one CPU thread, so the same machine and versions produce the same bytes.
gptailor/demo/README.md describes the result and the shortcuts that the training takes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import check_demo
import demo_data as data
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parent.parent / "gptailor" / "demo"
NUM_LAYERS = 12
NUM_DOCUMENTS = 200  # for each task; as many again are held out
SEED = 0
IGNORED = -100  # the label that transformers leaves out of the loss


@dataclass(frozen=True)
class Phase:
    """One training run.

    Attributes:
        steps, peak_lr: of AdamW with a one-cycle schedule.
        right, sloppy: the number of such lines in a batch, by skill.
        drop_from, drop_until: LayerDrop grows from none to `max_dropped` between these fractions
            of the steps.
        max_dropped: every step leaves out a random number of random layers, at most this many.
        layers_only: freeze embeddings and final norm.
    """

    steps: int
    peak_lr: float
    right: dict[str, int]
    sloppy: dict[str, int]
    drop_from: float = 0.0
    drop_until: float = 0.0
    max_dropped: int = 4
    layers_only: bool = False

    def most_dropped(self, step: int) -> int:
        """How many layers this step may leave out."""
        progress = step / self.steps
        if progress >= self.drop_until:
            return self.max_dropped
        grown = max(0.0, progress - self.drop_from) / (self.drop_until - self.drop_from)
        return round(self.max_dropped * grown)


def _finetuning(skill: str, steps: int, peak_lr: float) -> Phase:
    replayed = {other: 8 for other in data.SKILLS if other != skill}
    return Phase(steps, peak_lr, right={skill: 24}, sloppy=replayed, layers_only=True)


BASE_PHASES = (
    Phase(1000, 2.5e-3, dict.fromkeys(data.SKILLS, 32), {}, drop_from=0.25, drop_until=0.55),
    Phase(350, 1.5e-3, {}, dict.fromkeys(data.SKILLS, 24)),
)
FINETUNING_PHASES = {
    "translate": _finetuning("translate", 120, 5e-4),
    "sort": _finetuning("sort", 160, 5e-4),
    "clock": _finetuning("clock", 300, 1e-3),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word that adds nothing to a text."""
    ids = {word: index for index, word in enumerate(data.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """A randomly initialised Llama of about 340,000 parameters."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(SEED + 1)
    return LlamaForCausalLM(config)


def make_documents(tasks_dir: Path) -> frozenset[tuple[str, ...]]:
    """Write the tasks' documents; return the prompts that no training line may have.

    They do not include the clock's, whose table of 576 facts has to be learned completely.
    """
    excluded: set[tuple[str, ...]] = set()
    for index, skill in enumerate(data.SKILLS):
        docs = data.documents(skill, random.Random(SEED + index), 2 * NUM_DOCUMENTS)
        for suffix, part in (("", docs[:NUM_DOCUMENTS]), ("_holdout", docs[NUM_DOCUMENTS:])):
            rows = "".join(json.dumps(doc.as_json()) + "\n" for doc in part)
            (tasks_dir / f"demo_{skill}{suffix}.jsonl").write_text(rows, encoding="utf-8")
        if skill != "clock":
            excluded.update(doc.prompt for doc in docs)
    return frozenset(excluded)


def collate(lines: list[data.Line], ids: dict[str, int]) -> tuple[Tensor, Tensor]:
    """`lines` as right-padded input ids and labels, both [line, position] int64."""
    rows = [[*line.prompt, *line.answer, "</s>"] for line in lines]
    width = max(map(len, rows))
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    for index, (line, row) in enumerate(zip(lines, rows, strict=True)):
        tokens = torch.tensor([ids[word] for word in row])
        inputs[index, : len(row)] = tokens
        labels[index, len(line.prompt) : len(row)] = tokens[len(line.prompt) :]
    return inputs, labels


def train(
    model: LlamaForCausalLM, phase: Phase, excluded: frozenset[tuple[str, ...]], seed: int
) -> None:
    """Train `model` in place; the loss is taken on the answers only."""
    ids = {word: index for index, word in enumerate(data.vocabulary())}
    rng = random.Random(seed)
    model.requires_grad_(not phase.layers_only)
    model.model.layers.requires_grad_(True)
    weights = [p for p in model.parameters() if p.requires_grad]
    decay = 0.0 if phase.layers_only else 0.01
    optimizer = torch.optim.AdamW(weights, weight_decay=decay, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, phase.peak_lr, total_steps=phase.steps, pct_start=0.1
    )
    layers = list(model.model.layers)
    for step in range(phase.steps):
        lines = [
            data.line(skill, rng, is_sloppy=is_sloppy, excluded=excluded)
            for is_sloppy, counts in ((False, phase.right), (True, phase.sloppy))
            for skill, count in counts.items()
            for _ in range(count)
        ]
        inputs, labels = collate(lines, ids)
        dropped = rng.sample(range(NUM_LAYERS), rng.randint(0, phase.most_dropped(step)))
        model.model.layers = nn.ModuleList(
            layer for index, layer in enumerate(layers) if index not in dropped
        )
        loss = model(inputs, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    model.model.layers = nn.ModuleList(layers)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a Hugging Face folder in bfloat16; the model in memory is not changed."""
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.to(torch.bfloat16)
    rounded.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False
    )
    rounded.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    make_tokenizer().save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version knows
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Make the documents and the four models, then print the check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEMO, help="default: gptailor/demo")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    start = time.perf_counter()
    (out / "tasks").mkdir(parents=True, exist_ok=True)
    excluded = make_documents(out / "tasks")

    base = make_model(len(data.vocabulary()))
    for index, phase in enumerate(BASE_PHASES):
        train(base, phase, excluded, seed=SEED + 10 + index)
        print(f"base, phase {index}: {time.perf_counter() - start:.0f} s", flush=True)
    save(base, out / "models" / "base")
    for index, (skill, phase) in enumerate(FINETUNING_PHASES.items()):
        model = LlamaForCausalLM.from_pretrained(out / "models" / "base", dtype=torch.float32)
        train(model, phase, excluded, seed=SEED + 20 + index)
        save(model, out / "models" / skill)
        print(f"{skill}: {time.perf_counter() - start:.0f} s", flush=True)
    check_demo.report(out)


if __name__ == "__main__":
    main()
