"""Asking model servers: many requests at once over HTTP, each answered exactly once, kept on disk."""
