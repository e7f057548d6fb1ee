"""Reward models: trained on preferences, saved, opened, used as a reward."""
