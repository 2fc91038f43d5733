"""gptailor makes a language model smaller by cutting, stitching and merging layers of its finetunes."""
