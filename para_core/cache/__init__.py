"""Skipping the rest of a step whose first block barely changed anything."""
