"""Evaluation and comparison of policies and of reward backends; sees every other room, and no room sees it."""
