"""Programs and recipes to start from."""
