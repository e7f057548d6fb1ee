"""Ways to get a reward, side by side; ``rlaif compare``."""
