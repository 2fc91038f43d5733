"""The demo that ships with gptailor: a tiny family of models, three tasks, one search config."""

from pathlib import Path

PATH = Path(__file__).resolve().parent
