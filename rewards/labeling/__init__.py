"""AI preferences: what a labeler is asked, what it answered, and the command ``rlaif label``."""
