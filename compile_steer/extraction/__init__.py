"""Contrast pairs -> directions."""
