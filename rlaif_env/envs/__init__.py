"""Text generation as Gymnasium environments, by whole responses and by tokens, single and vectorised."""
