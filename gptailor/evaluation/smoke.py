"""The smoke test of a stitched folder: stock transformers loads it, runs it and generates."""

from __future__ import annotations

from pathlib import Path

from gptailor.errors import ModelError, ResourceError
from gptailor.models.checkpoint import Checkpoint

NUM_TOKENS = 20


def smoke_test(folder: str | Path) -> str:
    """Loads a model folder, runs one forward pass and generates 20 tokens.

    Returns:
        The generated text.

    Raises:
        ModelError: it does not load, or its logits are not numbers.
        ResourceError: it does not fit into memory.
    """
    import torch

    from gptailor.evaluation.loading import load_model, load_tokenizer

    folder = Path(folder)
    try:
        tokenizer = load_tokenizer(folder)
        model = load_model(folder, Checkpoint(folder).tensors, "auto").eval()
        ids = tokenizer("The", return_tensors="pt").input_ids
        if ids.shape[1] == 0:
            ids = torch.zeros((1, 1), dtype=torch.long)
        with torch.inference_mode():
            logits = model(input_ids=ids).logits
            if not torch.isfinite(logits).all():
                raise ModelError(f"{folder} was written, but its logits are not finite numbers.")
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                num_beams=1,  # whatever generation_config.json says: it may say 10**9
                num_return_sequences=1,
                pad_token_id=model.config.get_text_config().pad_token_id or 0,
            )
    except (torch.OutOfMemoryError, MemoryError, ResourceError) as error:
        raise ResourceError(
            f"{folder} was written, but does not fit into memory to be tested: use --no-verify."
        ) from error
    except (ValueError, OSError, RuntimeError, KeyError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} was written, but does not run: {reason}") from error
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
