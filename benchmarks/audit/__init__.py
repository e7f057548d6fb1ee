"""``rlaif audit``: a reward held to a battery of checks before a policy is trained on it."""
