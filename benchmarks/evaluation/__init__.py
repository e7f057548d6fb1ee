"""Policies on the same prompts, judged; ``rlaif evaluate``."""
