"""Replies -> scores of a behaviour."""
