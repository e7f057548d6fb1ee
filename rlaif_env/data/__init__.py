"""Tasks, prompts and preferences: read, validated with file and line, divided."""
