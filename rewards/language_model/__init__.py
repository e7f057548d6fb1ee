"""A language model as a judge: the exact likelihoods of its answers, and generated rationales."""
