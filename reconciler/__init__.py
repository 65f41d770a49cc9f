"""Keeps the keepers of headless pi sessions right."""
