"""The built-in checks of an audit, and what they are made of."""
