"""``rlaif train``: the loop, and what keeps a run safe around it."""
