"""The smoke test of a stitched folder: stock transformers loads it, runs it and generates."""

from __future__ import annotations

from pathlib import Path

from gptailor.errors import ModelError, ResourceError
from gptailor.models.checkpoint import Checkpoint

NUM_TOKENS = 20


def smoke_test(folder: str | Path, name: str | Path | None = None) -> str:
    """Loads a model folder, runs one forward pass and generates 20 tokens.

    Args:
        folder: the model folder.
        name: its final name, for errors.

    Returns:
        The generated text.

    Raises:
        ModelError: it does not load, or its logits are not finite.
        ResourceError: it does not fit into memory.
    """
    import torch

    from gptailor.evaluation.loading import load_model, load_tokenizer

    folder, name = Path(folder), name or folder
    try:
        tokenizer = load_tokenizer(folder)
        model = load_model(folder, Checkpoint(folder).tensors, "auto", strict=True).eval()
        ids = tokenizer("The", return_tensors="pt").input_ids
        if ids.shape[1] == 0:
            ids = torch.zeros((1, 1), dtype=torch.long)
        with torch.inference_mode():
            logits = model(input_ids=ids).logits
            if not torch.isfinite(logits).all():
                raise ModelError(f"{name} was not kept: its logits are not finite numbers.")
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                num_beams=1,  # overrides generation_config.json, which may say 10**9
                num_return_sequences=1,
                pad_token_id=getattr(model.config.get_text_config(), "pad_token_id", None) or 0,
            )
    except (torch.OutOfMemoryError, MemoryError, ResourceError) as error:
        raise ResourceError(
            f"{name} was not kept, as it does not fit into memory for the test: use --no-verify."
        ) from error
    except ModelError as error:
        text = str(error).replace(str(folder), str(name))
        known = text.startswith(f"{name} was")
        raise ModelError(text if known else f"{name} was not kept: {text}") from error
    except Exception as error:  # whatever the model's own code raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name} was not kept, as it does not run: {reason}") from error
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
