"""The likelihoods of answers from a model behind any OpenAI-compatible server."""
