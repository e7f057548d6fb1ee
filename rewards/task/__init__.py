"""A task of the user's own: its TOML file written from data, and looked at before anything is trained on it."""
