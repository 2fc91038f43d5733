"""Scoring recipes: a resident model, judged by lm-eval."""
